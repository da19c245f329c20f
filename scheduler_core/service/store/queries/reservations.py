"""Reservations: states in, changes out, old and forgotten ones gone."""

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert, or_, select, update

from kairos.scheduler_core.service.store.queries.numbering import next_number
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Reservation

_COLUMNS = ("request_id", "tenant", "state", "expires_at_s", "change", "body")


class ReservationRow(NamedTuple):
    """A reservation as it is stored."""

    request_id: str
    tenant: str | None
    state: str
    """waiting, prefill, decode or ended."""
    expires_at_s: float
    """When it expires, or, ended, when it may be deleted."""
    change: int
    """Rises with every change of any of them."""
    body: dict[str, Any]


def next_change(connection: Connection) -> int:
    """The number of the next change; nobody else makes one until this transaction ends.

    Microseconds of the clock at least: it rises also when the row of the highest one was deleted.
    """
    return max(next_number(connection, Reservation.change), int(time.time() * 1e6))


def put_reservations(connection: Connection, rows: Sequence[ReservationRow], there: Collection[str]) -> None:
    """Store states: those of ids that are `there` in place of the old ones, the others as new ones."""
    new = [row._asdict() for row in rows if row.request_id not in there]
    if new:
        connection.execute(insert(Reservation), new)
    changed = [{f"b_{name}": value for name, value in row._asdict().items()} for row in rows if row.request_id in there]
    if changed:
        values: dict[str, Any] = {name: bindparam(f"b_{name}") for name in _COLUMNS[1:]}
        table = Reservation.__table__
        connection.execute(update(table).where(table.c.request_id == bindparam("b_request_id")).values(values), changed)  # type: ignore[arg-type]  # a Table, though typed as any FromClause


def reservations_named(connection: Connection, request_ids: Sequence[str]) -> list[ReservationRow]:
    """Those of these ids."""
    found = select(*_columns()).where(Reservation.request_id.in_(request_ids))
    return [ReservationRow(*row) for row in connection.execute(found)]


def reservations_after(connection: Connection, change: int, most: int) -> list[ReservationRow]:
    """Those that changed after a change, in the order of their changes."""
    found = select(*_columns()).where(Reservation.change > change).order_by(Reservation.change).limit(most)
    return [ReservationRow(*row) for row in connection.execute(found)]


def delete_ended_reservations(store: Store, now_s: float) -> None:
    """Delete those that ended so long ago that nobody asks for them."""
    with store.write() as connection:
        connection.execute(delete(Reservation).where(Reservation.state == "ended", Reservation.expires_at_s <= now_s))


def forget_reservations(store: Store, *, tenants: Sequence[str], requests: Sequence[str], everyone: bool) -> None:
    """Delete those that have ended; live ones keep their ids until they do."""
    ended = delete(Reservation).where(Reservation.state == "ended")
    if not everyone:
        ended = ended.where(or_(Reservation.tenant.in_(tenants), Reservation.request_id.in_(requests)))
    with store.write() as connection:
        connection.execute(ended)


def _columns() -> list[Any]:
    return [getattr(Reservation, name) for name in _COLUMNS]
