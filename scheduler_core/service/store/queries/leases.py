"""Work that one replica does for all."""

import time

from sqlalchemy import Connection, delete, func, select, update

from kairos.scheduler_core.service.store.queries.upsert import insert_into
from kairos.scheduler_core.service.store.tables import Lease


def take_lease(connection: Connection, name: str, holder: str, seconds: float) -> bool:
    """Whether this holder has the work now, for so many seconds; asking again renews it.

    Times are the database's, so that replicas need not agree on the time.
    """
    now_s = _now_s(connection)
    values = {"holder": holder, "until_s": now_s + seconds}
    connection.execute(
        insert_into(connection, Lease).values(name=name, holder="", until_s=0.0).on_conflict_do_nothing()
    )
    free = (Lease.name == name) & ((Lease.holder == holder) | (Lease.until_s <= now_s))
    return connection.execute(update(Lease).where(free).values(**values)).rowcount == 1


def give_back_lease(connection: Connection, name: str, holder: str) -> None:
    """Let others have the work at once."""
    connection.execute(delete(Lease).where(Lease.name == name, Lease.holder == holder))


def _now_s(connection: Connection) -> float:
    if connection.dialect.name == "postgresql":
        return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)
    return time.time()
