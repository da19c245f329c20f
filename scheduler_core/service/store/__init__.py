"""What the control plane remembers, in SQLite or PostgreSQL: `session.py` opens, `queries.py` asks, `tables.py` is."""
