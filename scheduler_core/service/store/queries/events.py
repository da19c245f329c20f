"""What happened that an operator would want to know."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, select

from kairos.scheduler_core.service.store.tables import Event


class EventRow(NamedTuple):
    """One event."""

    id: int
    at: datetime
    kind: str
    subject: str
    detail: dict[str, Any]


def add_event(connection: Connection, kind: str, subject: str, detail: dict[str, Any]) -> None:
    """Keep an event, in the transaction of what it tells about."""
    connection.execute(insert(Event).values(at=datetime.now(UTC), kind=kind, subject=subject, detail=detail))


def latest_events(connection: Connection, most: int, before: int | None = None) -> list[EventRow]:
    """The newest ones first; of those before an id, where one is given."""
    query = select(Event.id, Event.at, Event.kind, Event.subject, Event.detail).order_by(Event.id.desc()).limit(most)
    if before is not None:
        query = query.where(Event.id < before)
    return [EventRow(*row) for row in connection.execute(query)]


def last_event(connection: Connection) -> int:
    """The highest id."""
    return connection.scalar(select(func.max(Event.id))) or 0


def events_after(connection: Connection, after: int) -> list[EventRow]:
    """Those with a higher id, the oldest first."""
    columns = (Event.id, Event.at, Event.kind, Event.subject, Event.detail)
    return [EventRow(*row) for row in connection.execute(select(*columns).where(Event.id > after).order_by(Event.id))]
