"""The experiments of a running service: planned, started, looked at, ended; each change is one transaction."""

import hashlib
import secrets
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection

from kairos.scheduler_core.errors import ConflictError
from kairos.scheduler_core.experiment import Clock, iso, sign
from kairos.scheduler_core.service.experiments.checks import check_instances, check_plan, check_shadow
from kairos.scheduler_core.service.experiments.design import Pair, Plan, draw_schedule
from kairos.scheduler_core.service.experiments.record import Record, record_of
from kairos.scheduler_core.service.experiments.shadow import (
    Block,
    Sample,
    ShadowPlan,
    ShadowRecord,
    shadow_record,
)
from kairos.scheduler_core.service.experiments.verdict import Ending
from kairos.scheduler_core.service.plane import Database, Plane
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.queries import experiments as queries
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.queries.experiments import StoredExperiment
from kairos.scheduler_core.service.store.queries.numbering import lock
from kairos.scheduler_core.service.store.queries.strategies import activate_strategy, active_strategy
from kairos.scheduler_core.service.store.tables import Activation
from kairos.scheduler_core.service.strategies import Strategies

LEAD_S = 5.0
"""Real seconds from the start to the first slot: every data plane has pulled the schedule by then."""
REDRAWN_S = 3600.0
"""A schedule is drawn anew so often, each time for 24 h, the last hour included: clocks and pulls may lag."""


class Running:
    """An experiment that runs, with its plan as it was fixed."""

    def __init__(self, stored: StoredExperiment) -> None:
        self.stored = stored
        self.plan = msgspec.convert(stored.plan, Plan)
        self._signed: tuple[float, str] | None = None

    def schedule(self, now_s: float, key: bytes) -> str:
        """What runs from an hour ago to at least 22 h from now, signed."""
        start_s = self.stored.started_at_s
        from_s = start_s + max(0.0, (now_s - start_s) // REDRAWN_S - 1) * REDRAWN_S
        if self._signed is None or self._signed[0] != from_s:
            drawn = draw_schedule(self.plan, self.stored.generation, start_s, from_s)
            self._signed = from_s, sign(drawn, key).decode()
        return self._signed[1]


class RunningShadow(NamedTuple):
    """A shadow that looks on."""

    stored: StoredExperiment
    plan: ShadowPlan


class Experiments:
    """Keeps experiments in the store; at most one acts on traffic at a time."""

    def __init__(self, plane: Plane, database: Database, strategies: Strategies, clock: Clock) -> None:
        """Take over what runs.

        Raises:
            StoreError: the database is away.
        """
        self.plane, self.database, self.strategies = plane, database, strategies
        self.clock = clock
        self.running: Running | None = None
        """The one that acts on traffic."""
        self.shadow: RunningShadow | None = None
        self.look()
        database.changes.watch("experiments", self.look)
        strategies.before_change = self._before_change

    def look(self) -> None:
        """Take over what runs by what the store says.

        Raises:
            StoreError: the database is away.
        """
        with self.database.store.read() as connection:
            found = queries.running_experiments(connection)
        acting = next((stored for stored in found if stored.design != "shadow"), None)
        if acting != (self.running.stored if self.running else None):
            self.running = Running(acting) if acting else None
        shadow = next((stored for stored in found if stored.design == "shadow"), None)
        self.shadow = RunningShadow(shadow, msgspec.convert(shadow.plan, ShadowPlan)) if shadow else None

    def signed(self, running: Running) -> tuple[str, str]:
        """The schedule of an experiment as a data plane gets it, and which key signed it."""
        key = running.stored.key
        return running.schedule(self.clock.now_s(), key), hashlib.sha256(key).hexdigest()[:16]

    # -- changes

    def start(self, plan: Plan | ShadowPlan) -> StoredExperiment:
        """Begin an experiment, a few seconds from now.

        Raises:
            FieldsError, UnknownNameError: the plan cannot be run.
            ConflictError: one runs already, or the champion is not active.
        """
        if isinstance(plan, ShadowPlan):
            check_shadow(plan)
        else:
            check_instances(check_plan(plan), self.plane.settings.fleet)
        for name in (plan.champion, plan.challenger):
            self.strategies.known.named(name)
        configured = self.plane.settings.service.schedule_key
        with self.database.store.write() as connection:
            lock(connection, Activation)
            self._require_room(connection, plan.design)
            active = active_strategy(connection)
            if active is None or f"{active.name}@{active.version}" != plan.champion:
                raise ConflictError(f"{plan.champion} is not active; plan again, or activate it first")
            experiment_id = queries.next_experiment_id(connection)
            started = StoredExperiment(
                id=experiment_id,
                design=plan.design,
                state="running",
                plan=msgspec.to_builtins(msgspec.structs.replace(plan, id=experiment_id)),
                started_at_s=float(round(self.clock.in_s(LEAD_S))),
                generation=active.generation,
                key=configured.get_secret_value().encode() if configured else secrets.token_bytes(32),
                ended_at=None,
                record=None,
            )
            queries.add_experiment(connection, started)
            detail = {"design": plan.design, "champion": plan.champion, "challenger": plan.challenger}
            add_event(connection, "experiment_started", experiment_id, detail)
            announce(connection, "experiments")
        self.database.changes.look("experiments")
        return started

    def _require_room(self, connection: Connection, design: str) -> None:
        alike = [s for s in queries.running_experiments(connection) if (s.design == "shadow") == (design == "shadow")]
        running = [stored.id for stored in alike]
        if running:
            raise ConflictError(f"{running[0]} runs; stop it first, since two experiments would disturb each other")

    def stop(self, experiment_id: str) -> Record | ShadowRecord:
        """End an experiment because an operator wants it; the record it ended in, whoever ended it.

        Raises:
            UnknownNameError: there is none of this id.
        """
        self.end(experiment_id, Ending("user"))
        return self.record(experiment_id)

    def end(self, experiment_id: str, ending: Ending | None) -> None:
        """End an experiment with the verdict that its pairs give: the champion is back from this transaction on."""
        with self.database.store.write() as connection:
            lock(connection, Activation)
            ended = self._end(connection, experiment_id, ending)
        if ended:
            self.database.changes.look("experiments")
            self.database.changes.look("strategies")

    def _end(self, connection: Connection, experiment_id: str, ending: Ending | None) -> bool:
        stored = queries.experiment(connection, experiment_id)
        if not queries.end_experiment(connection, experiment_id):
            return False
        generation = stored.generation
        if stored.design != "shadow":  # which changed nothing
            name, _, version = str(stored.plan["champion"]).rpartition("@")
            generation = activate_strategy(connection, name, int(version))
        record = self._record(connection, stored, ending, iso(self.clock.now_s()), generation)
        queries.keep_record(connection, experiment_id, generation, msgspec.to_builtins(record))
        detail = {"verdict": record.verdict, "sentence": record.sentence, "generation": generation}
        add_event(connection, "experiment_ended", experiment_id, detail)
        announce(connection, "experiments")
        announce(connection, "strategies")
        return True

    def _before_change(self, connection: Connection, stop_experiment: bool) -> None:
        """Pass a change of the active strategy, once no experiment depends on it.

        Raises:
            ConflictError: one runs, and it is not to be stopped.
        """
        lock(connection, Activation)
        for stored in queries.running_experiments(connection):
            if stored.design == "shadow":
                continue
            if not stop_experiment:
                raise ConflictError(
                    f"{stored.id} compares the active strategy with another one; stop it first, or say stop_experiment"
                )
            self._end(connection, stored.id, Ending("user"))

    # -- records

    def record(self, experiment_id: str) -> Record | ShadowRecord:
        """The record of an experiment as it stands.

        Raises:
            UnknownNameError: there is none of this id.
        """
        with self.database.store.read() as connection:
            stored = queries.experiment(connection, experiment_id)
            if stored.record is not None:
                kind: type[Record | ShadowRecord] = ShadowRecord if stored.design == "shadow" else Record
                return msgspec.convert(stored.record, kind)
            return self._record(connection, stored, None, None, stored.generation)

    def _record(
        self,
        connection: Connection,
        stored: StoredExperiment,
        ending: Ending | None,
        stopped_at: str | None,
        generation: int,
    ) -> Record | ShadowRecord:
        if stored.design == "shadow":
            return shadow_record(
                msgspec.convert(stored.plan, ShadowPlan),
                msgspec.convert(queries.pairs(connection, stored.id, "sample"), list[Sample]),
                msgspec.convert(queries.pairs(connection, stored.id, "block"), list[Block]),
                iso(stored.started_at_s),
                stopped_at,
            )
        return record_of(
            msgspec.convert(stored.plan, Plan),
            self.pairs(connection, stored.id, "live"),
            ending,
            iso(stored.started_at_s),
            stopped_at,
            generation,
            self.pairs(connection, stored.id, "champion"),
        )

    def pairs(self, connection: Connection, experiment_id: str, kind: queries.PairKind) -> list[Pair]:
        """What was observed so far."""
        observed: list[Any] = queries.pairs(connection, experiment_id, kind)
        return msgspec.convert(observed, list[Pair])
