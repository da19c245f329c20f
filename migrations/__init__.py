"""Alembic's: one file a revision in `versions/`, each by itself, none importing our tables (they move on)."""
