"""What runs an experiment: closes pairs, judges, acts on guards, ends it. One replica does it for all, by lease.

Everything it knows is in the store: after a restart, or on another replica, the same pairs close with the same arms.
"""

import logging
import math
import time
import uuid
from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.experiment import Schedule, Slot
from kairos.scheduler_core.replay import Arrivals, Replayed
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.experiments.design import (
    SHORTEST_BLOCK_S,
    Plan,
    champion_pairs,
    closed_pairs,
    draw_schedule,
    mock_of,
    slots_between,
)
from kairos.scheduler_core.service.experiments.health import breaches_of, serves_challenger
from kairos.scheduler_core.service.experiments.keeper import Experiments, Running, RunningShadow
from kairos.scheduler_core.service.experiments.observe import Ask, SlotReported, lead_s, pair_of, seen
from kairos.scheduler_core.service.experiments.replaying import ReplayProcess
from kairos.scheduler_core.service.experiments.shadow import replayed_block
from kairos.scheduler_core.service.experiments.verdict import Breach, Ending, judge
from kairos.scheduler_core.service.store.queries import experiments as queries
from kairos.scheduler_core.service.store.queries.leases import give_back_lease, take_lease

_log = logging.getLogger(__name__)

TICK_S = 1.0
LEASE_S = 20.0
SETTLE_S = 60.0
"""After its end, when a shadow's block is looked at."""
ARRIVAL_LAG_S = 3.0
"""Real seconds that telemetry may take from a data plane into the store, on top of a block's own settling."""


class Runner:
    """The thread behind running experiments."""

    def __init__(self, experiments: Experiments, replays: ReplayProcess | None) -> None:
        self.experiments, self._replays = experiments, replays
        self._holder = uuid.uuid4().hex
        self._background = Background("kairos-experiments", self._run)
        self._looked_s: float | None = None
        self._judged: tuple[str, int] | None = None
        self._listens_since = -math.inf

    def start(self) -> None:
        """Begin."""
        self._background.start()

    def stop(self) -> None:
        """Return once nothing runs any more, and others may go on at once."""
        self._background.stop()
        if self._replays is not None:
            self._replays.stop()

    def _run(self) -> None:
        self._listens_since = time.monotonic()
        away = False
        while not self._background.stopped.wait(TICK_S):
            try:
                self.tick()
                away = False
            except StoreError as error:
                self._listens_since = time.monotonic()
                if not away:
                    _log.warning("experiments wait until the database answers again: %s", error)
                away = True
            except Exception:
                _log.exception("an experiment could not be advanced; it is tried again")
        try:
            with self.experiments.database.store.write() as connection:
                give_back_lease(connection, "experiments", self._holder)
        except StoreError as error:
            _log.warning("others take over experiments in %.0f s: %s", LEASE_S, error)

    def tick(self) -> None:
        """Bring the running experiment up to this instant, if that is this replica's work."""
        running, shadow = self.experiments.running, self.experiments.shadow
        if not (running or shadow) or not self._holds():
            return
        now_s = self.experiments.clock.now_s()
        if shadow:
            self._replay_shadow(shadow, now_s)
        if running:
            self._advance(running, now_s)

    def _advance(self, running: Running, now_s: float) -> None:
        if breach := self._breach(running, now_s):
            self.experiments.end(running.stored.id, Ending("guard", breach))
            return
        self._close(running, now_s)
        self._judge(running, now_s)
        self._looked_s = now_s

    def _holds(self) -> bool:
        with self.experiments.database.store.write() as connection:
            return take_lease(connection, "experiments", self._holder, LEASE_S)

    def _lag_s(self) -> float:
        return ARRIVAL_LAG_S * self.experiments.clock.scale

    # -- pairs

    def _close(self, running: Running, now_s: float) -> None:
        """Store every pair whose blocks have closed since.

        None right after a start or an outage: what data planes could not deliver meanwhile is on its way.
        """
        if time.monotonic() - self._listens_since < ARRIVAL_LAG_S:
            return
        plan, start_s, settled_s = running.plan, running.stored.started_at_s, now_s - self._lag_s()
        closed: dict[queries.PairKind, tuple[Plan, list[tuple[Slot, ...]]]] = {
            "live": (plan, closed_pairs(plan, start_s, settled_s)),
            "champion": (mock_of(plan), champion_pairs(plan, start_s, settled_s)),
        }
        for kind, (of, pairs) in closed.items():
            with self.experiments.database.store.read() as connection:
                kept = {pair.i for pair in self.experiments.pairs(connection, running.stored.id, kind)}
            for slots in pairs:
                if slots[0].pair in kept:
                    continue
                if self._background.stopped.is_set() or not self._holds():
                    return
                self._observe(running, kind, of, slots)

    def _observe(self, running: Running, kind: queries.PairKind, plan: Plan, slots: Sequence[Slot]) -> None:
        stored, database = running.stored, self.experiments.database
        start_s, end_s = slots[0].start_s, slots[-1].end_s
        requests = queries.read_outcomes(database.store, start_s - lead_s(plan), end_s)
        with database.store.read() as connection:
            reports = self._reports(connection, running, start_s, end_s) if kind == "live" else []
            sessions = sorted({s for s in requests.session.tolist() if s}) if plan.design == "sticky" else []
            known = queries.sessions_seen(connection, sessions, stored.started_at_s, start_s)
        schedule = self._schedule(running, start_s)
        window = seen(plan, requests, self.ask(plan.champion), reports, known, _arms_before(running, start_s))
        pair = pair_of(plan, schedule, slots, window)
        with database.store.write() as connection:
            queries.add_pair(connection, stored.id, kind, pair.i, msgspec.to_builtins(pair))

    def _reports(self, connection: Connection, running: Running, from_s: float, until_s: float) -> list[SlotReported]:
        told = queries.reports(connection, running.stored.id, from_s - 1e-3, until_s - 1e-3)
        return msgspec.convert(told, list[SlotReported])

    def _schedule(self, running: Running, from_s: float) -> Schedule:
        return draw_schedule(running.plan, running.stored.generation, running.stored.started_at_s, from_s)

    def ask(self, name: str) -> Ask | None:
        """A replay of a champion (`name@version`); None: there is no simulator, or no such strategy here."""
        replays, champion = self._replays, self.experiments.strategies.known.versions.get(name)
        if replays is None or champion is None:
            return None

        def ask(arrivals: Arrivals) -> Replayed | None:
            return replays.run(champion.strategy, arrivals)

        return ask

    # -- shadows

    def _replay_shadow(self, shadow: RunningShadow, now_s: float) -> None:
        """Replay both strategies on every block that has closed since, and end the shadow when its time is over."""
        stored, plan, database = shadow.stored, shadow.plan, self.experiments.database
        asks = self.ask(plan.champion), self.ask(plan.challenger)
        with database.store.read() as connection:
            kept = {block["start_s"] for block in queries.pairs(connection, stored.id, "block")}
        blocks = int((now_s - self._lag_s() - SETTLE_S - stored.started_at_s) // SHORTEST_BLOCK_S)
        for i in range(blocks):
            start_s = stored.started_at_s + i * SHORTEST_BLOCK_S
            if start_s in kept:
                continue
            if self._background.stopped.is_set() or not self._holds():
                return
            earlier_s = start_s - SHORTEST_BLOCK_S
            requests = queries.read_outcomes(database.store, earlier_s, start_s + SHORTEST_BLOCK_S)
            block = replayed_block(start_s, requests, *asks)
            if block is None:
                continue
            with database.store.write() as connection:
                queries.add_pair(connection, stored.id, "block", i, msgspec.to_builtins(block))
        if now_s > stored.started_at_s + plan.max_hours * 3600.0:
            self.experiments.end(stored.id, Ending("time"))

    # -- verdicts

    def _judge(self, running: Running, now_s: float) -> None:
        """End the experiment once its pairs, or its time, say so."""
        stored, plan = running.stored, running.plan
        with self.experiments.database.store.read() as connection:
            pairs = self.experiments.pairs(connection, stored.id, "live")
        over = now_s > stored.started_at_s + plan.max_hours * 3600 + plan.lengths.settle_s + self._lag_s()
        if (stored.id, len(pairs)) == self._judged and not over:
            return
        ending = Ending("time") if over else None
        finding = judge(plan, pairs, ending)
        log_e = self.experiments.plane.metrics.experiment_log_e
        log_e.labels("better").set(finding.evidence.log_e_better)
        log_e.labels("harm").set(finding.evidence.log_e_harm)
        self._judged = stored.id, len(pairs)
        if finding.stops:
            self.experiments.end(stored.id, ending)

    def _breach(self, running: Running, now_s: float) -> Breach | None:
        """The first absolute guard that acts on a slot whose requests may still be ending."""
        plan = running.plan
        if plan.limits is None:
            return None
        looked_s = now_s if self._looked_s is None else self._looked_s
        open_s = min(looked_s, now_s) - plan.lengths.settle_s - self._lag_s()
        for slot in slots_between(plan, running.stored.started_at_s, open_s, now_s):
            if not serves_challenger(slot):
                continue
            requests = queries.read_outcomes(
                self.experiments.database.store, slot.start_s - plan.lengths.block_s, min(slot.end_s, now_s)
            )
            with self.experiments.database.store.read() as connection:
                reports = self._reports(connection, running, slot.start_s, slot.end_s)
            if found := breaches_of(plan, plan.limits, slot, requests, reports, self.ask(plan.champion)):
                return found[0]
        return None


def _arms_before(running: Running, start_s: float) -> str:
    """What ran right before a pair: the champion where nothing did."""
    plan = running.plan
    before = slots_between(plan, running.stored.started_at_s, start_s - 1.0, start_s - 1.0)
    return before[-1].arms if before else "AA" if plan.design == "pools" else "A"
