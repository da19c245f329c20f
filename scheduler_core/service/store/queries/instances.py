"""Instances of the live fleet, as they were announced."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from kairos.scheduler_core.service.store.tables import Instance


class InstanceRow(NamedTuple):
    """An instance as it is stored."""

    instance_id: str
    state: str
    """active, draining, or gone: one of the configuration that was removed."""
    body: dict[str, Any]


def stored_instances(connection: Connection) -> list[InstanceRow]:
    """All of them, in the order of their ids."""
    found = select(Instance.instance_id, Instance.state, Instance.body).order_by(Instance.instance_id)
    return [InstanceRow(*row) for row in connection.execute(found)]


def put_instance(connection: Connection, row: InstanceRow) -> None:
    """Store one, in place of the one of its id."""
    values = {"state": row.state, "body": row.body, "changed_at": datetime.now(UTC)}
    same = update(Instance).where(Instance.instance_id == row.instance_id).values(**values)
    if not connection.execute(same).rowcount:
        connection.execute(insert(Instance).values(instance_id=row.instance_id, **values))


def delete_instance(connection: Connection, instance_id: str) -> None:
    """Delete the one of that id."""
    connection.execute(delete(Instance).where(Instance.instance_id == instance_id))
