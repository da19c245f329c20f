"""What the control plane remembers, in SQLite or PostgreSQL: `session.py` opens, `queries/` asks, `tables.py` is."""
