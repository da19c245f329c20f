"""Numbers that rise by one, and the rows that versions name."""

from typing import cast

from sqlalchemy import ColumnElement, Connection, func, select, text
from sqlalchemy.orm import InstrumentedAttribute

from kairos.scheduler_core.errors import UnknownNameError
from kairos.scheduler_core.service.store.tables import Model, Strategy, Table


def lock(connection: Connection, table: type[Table]) -> None:
    """Keep others from writing into a table until this transaction ends; on SQLite none other writes anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"LOCK TABLE {table.__tablename__} IN SHARE ROW EXCLUSIVE MODE"))


def next_number(connection: Connection, column: InstrumentedAttribute[int], *where: ColumnElement[bool]) -> int:
    """One above the highest number, which nobody else gets until this transaction ends."""
    lock(connection, cast("type[Table]", column.class_))
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
