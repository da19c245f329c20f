"""Inserts that can say what happens where a row is there already."""

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from kairos.scheduler_core.service.store.tables import Table


def insert_into(connection: Connection, table: type[Table]) -> postgresql.Insert | sqlite.Insert:
    """An insert of the database's own kind, which has `on_conflict_do_nothing` and `on_conflict_do_update`."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
