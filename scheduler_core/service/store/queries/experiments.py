"""Experiments: what was fixed, what was observed, what data planes reported, what they ended in."""

import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from kairos.scheduler_core.errors import UnknownNameError
from kairos.scheduler_core.service.experiments.outcomes import TENANT_GROUPS, Outcomes
from kairos.scheduler_core.service.store.queries.numbering import lock
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Experiment, ExperimentPair, ExperimentReport, Request

PairKind = Literal["live", "champion", "sample", "block"]
"""Of the experiment; of the champion against itself where it runs alone; a shadow's decisions and replayed blocks."""


class StoredExperiment(NamedTuple):
    """An experiment as it is kept."""

    id: str
    design: str
    state: Literal["running", "ended"]
    plan: dict[str, Any]
    started_at_s: float
    """On the clock of experiments."""
    generation: int
    key: bytes
    """What its schedules are signed with, whatever the configuration says later."""
    ended_at: datetime | None
    record: dict[str, Any] | None


_COLUMNS = tuple(getattr(Experiment, name) for name in StoredExperiment._fields)


def next_experiment_id(connection: Connection) -> str:
    """An id that nobody else gets until this transaction ends."""
    lock(connection, Experiment)
    return f"exp_{(connection.scalar(select(func.count()).select_from(Experiment)) or 0) + 1:02d}"


def add_experiment(connection: Connection, started: StoredExperiment) -> None:
    """Keep an experiment from its start on."""
    connection.execute(insert(Experiment).values(**started._asdict()))


def experiment(connection: Connection, experiment_id: str) -> StoredExperiment:
    """One experiment.

    Raises:
        UnknownNameError: there is none of this id.
    """
    row = connection.execute(select(*_COLUMNS).where(Experiment.id == experiment_id)).first()
    if row is None:
        raise UnknownNameError("experiment", experiment_id, [told.id for told in latest_experiments(connection, 20)])
    return StoredExperiment(*row)


def latest_experiments(connection: Connection, most: int) -> list[StoredExperiment]:
    """The newest ones first."""
    rows = connection.execute(select(*_COLUMNS).order_by(Experiment.started_at_s.desc()).limit(most))
    return [StoredExperiment(*row) for row in rows]


def running_experiments(connection: Connection) -> list[StoredExperiment]:
    """All that run, the oldest first."""
    rows = connection.execute(select(*_COLUMNS).where(Experiment.state == "running").order_by(Experiment.started_at_s))
    return [StoredExperiment(*row) for row in rows]


def end_experiment(connection: Connection, experiment_id: str) -> bool:
    """Whether it ends here, in this transaction, and not somewhere else already."""
    running = (Experiment.id == experiment_id) & (Experiment.state == "running")
    ended = update(Experiment).where(running).values(state="ended", ended_at=datetime.now(UTC))
    return connection.execute(ended).rowcount == 1


def keep_record(connection: Connection, experiment_id: str, generation: int, record: dict[str, Any]) -> None:
    """Keep what an experiment ended in, with the generation of the champion put back."""
    kept = update(Experiment).where(Experiment.id == experiment_id)
    connection.execute(kept.values(generation=generation, record=record))


def add_pair(connection: Connection, experiment_id: str, kind: PairKind, i: int, observed: dict[str, Any]) -> None:
    """Keep a pair, unless it is there: it never changes."""
    connection.execute(
        _insert(connection, ExperimentPair)
        .values(experiment=experiment_id, kind=kind, i=i, observed=observed)
        .on_conflict_do_nothing()
    )


def pairs(connection: Connection, experiment_id: str, kind: PairKind) -> list[dict[str, Any]]:
    """What was observed, in the order of the coins."""
    mine = (ExperimentPair.experiment == experiment_id) & (ExperimentPair.kind == kind)
    return list(connection.scalars(select(ExperimentPair.observed).where(mine).order_by(ExperimentPair.i)))


def put_report(
    connection: Connection, experiment_id: str, data_plane: str, slot_start_s: float, body: dict[str, Any]
) -> None:
    """Keep what a data plane did in a slot, in place of what it said of it before.

    Raises:
        UnknownNameError: there is no such experiment.
    """
    experiment(connection, experiment_id)
    key = {"experiment": experiment_id, "data_plane": data_plane, "slot_start_s": slot_start_s}
    connection.execute(
        _insert(connection, ExperimentReport)
        .values(**key, body=body)
        .on_conflict_do_update(index_elements=list(key), set_={"body": body})
    )


def reports(connection: Connection, experiment_id: str, from_s: float, until_s: float) -> list[dict[str, Any]]:
    """What all data planes said of the slots that begin in a stretch of time."""
    at = ExperimentReport.slot_start_s
    mine = (ExperimentReport.experiment == experiment_id) & (at >= from_s) & (at < until_s)
    return list(connection.scalars(select(ExperimentReport.body).where(mine)))


def sessions_seen(connection: Connection, sessions: Sequence[str], from_s: float, until_s: float) -> frozenset[str]:
    """Which of these sessions had a request in a stretch of time."""
    found: set[str] = set()
    during = (Request.arrived_at_s >= from_s) & (Request.arrived_at_s < until_s)
    for k in range(0, len(sessions), 500):
        some = Request.session.in_(sessions[k : k + 500])
        found.update(connection.scalars(select(Request.session).where(some, during).distinct()))
    return frozenset(found)


def read_outcomes(store: Store, from_s: float, until_s: float, most: int | None = None) -> Outcomes:
    """Requests that arrived in a stretch of time, the newest `most` of them, in order of arrival."""
    columns = tuple(getattr(Request, name) for name in _NUMBERS + _WORDS)
    during = (Request.arrived_at_s >= from_s) & (Request.arrived_at_s < until_s)
    newest = select(*columns).where(during).order_by(Request.arrived_at_s.desc(), Request.id.desc()).limit(most)
    with store.read() as connection:
        rows = [tuple(row) for row in connection.execute(newest)][::-1]
    numbers = np.array([row[: len(_NUMBERS)] for row in rows], np.float64).reshape(-1, len(_NUMBERS))
    column = {name: numbers[:, place] for place, name in enumerate(_NUMBERS)}
    words = {name: [row[len(_NUMBERS) + place] or "" for row in rows] for place, name in enumerate(_WORDS)}
    groups = [zlib.crc32(tenant.encode()) % TENANT_GROUPS if tenant else -1 for tenant in words["tenant"]]
    return Outcomes(
        arrival_s=column["arrived_at_s"],
        prompt_tokens=column["input_tokens"].astype(np.int64),
        output_tokens=np.nan_to_num(column["output_tokens"]).astype(np.int64),
        status=column["status"].astype(np.int64),
        ttft_s=column["ttft_s"],
        tpot_s=column["tpot_s"],
        wait_s=column["wait_s"],
        ttft_target_s=np.nan_to_num(column["ttft_target_s"], nan=np.inf),
        tpot_target_s=np.nan_to_num(column["tpot_target_s"], nan=np.inf),
        pool=np.nan_to_num(column["pool"], nan=-1.0).astype(np.int64),
        tenant_group=np.array(groups, np.int64),
        strategy=np.array(words["strategy"], np.object_),
        session=np.array(words["session"], np.object_),
        slo_class=np.array(words["slo_class"], np.object_),
    )


_NUMBERS = (
    *("arrived_at_s", "input_tokens", "output_tokens", "status", "ttft_s", "tpot_s", "wait_s"),
    *("ttft_target_s", "tpot_target_s", "pool"),
)
_WORDS = ("strategy", "session", "slo_class", "tenant")


def _insert(
    connection: Connection, table: type[ExperimentPair] | type[ExperimentReport]
) -> postgresql.Insert | sqlite.Insert:
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
