"""Numbers that rise by one, and the rows that versions name."""

from sqlalchemy import ColumnElement, Connection, func, select, text
from sqlalchemy.orm import InstrumentedAttribute

from kairos.scheduler_core.errors import UnknownNameError
from kairos.scheduler_core.service.store.tables import Model, Strategy


def next_number(connection: Connection, column: InstrumentedAttribute[int], *where: ColumnElement[bool]) -> int:
    """One above the highest number, which nobody else gets until this transaction ends."""
    if connection.dialect.name == "postgresql":  # SQLite has the write lock
        connection.execute(text(f"LOCK TABLE {column.class_.__tablename__} IN SHARE ROW EXCLUSIVE MODE"))
    return (connection.scalar(select(func.max(column)).where(*where)) or 0) + 1


def version_id(
    connection: Connection,
    what: str,
    table: type[Model] | type[Strategy],
    named: ColumnElement[bool],
    name: str,
    version: int,
) -> int:
    """The id of a version."""
    versions = {row.version: row.id for row in connection.execute(select(table.version, table.id).where(named))}
    if version not in versions:
        known = [f"{name} {number}" for number in versions]
        raise UnknownNameError(f"{what} version", f"{name} {version}", known)
    return int(versions[version])
