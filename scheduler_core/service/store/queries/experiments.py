"""Experiments: what was fixed, what was observed, what data planes reported, what they ended in."""

from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from kairos.scheduler_core.errors import UnknownNameError
from kairos.scheduler_core.service.store.tables import Experiment, ExperimentReport


def put_report(
    connection: Connection, experiment: str, data_plane: str, slot_start_s: float, body: dict[str, Any]
) -> None:
    """Keep what a data plane did in a slot, in place of what it said of it before.

    Raises:
        UnknownNameError: there is no such experiment.
    """
    if connection.scalar(select(Experiment.id).where(Experiment.id == experiment)) is None:
        known = connection.scalars(select(Experiment.id).order_by(Experiment.started_at_s.desc()).limit(20))
        raise UnknownNameError("experiment", experiment, known)
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    key = {"experiment": experiment, "data_plane": data_plane, "slot_start_s": slot_start_s}
    connection.execute(
        insert(ExperimentReport)
        .values(**key, body=body)
        .on_conflict_do_update(index_elements=list(key), set_={"body": body})
    )
