"""The gateway's part in live experiments: whose turn it is to decide, and what came of it, slot by slot.

Slots, arrivals and reports are on the control plane's clock of experiments; latencies are real seconds on any clock.
It plays `switchback`, with the whole fleet; `pools`, with every other instance and every other session; and `sticky`,
with each arm's sessions on instances of their own, as large a share of them as of the sessions.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from msgspec import structs

from kairos.adapters.dataplane.arms import Active, Arms, Running
from kairos.adapters.dataplane.reports import ArmReport, SlotReport, exceptions_among
from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.instances import LiveInstance
from kairos.adapters.gateway.scheduling import Scheduler
from kairos.adapters.gateway.trust import Headers
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.experiment import Clock, Slot
from kairos.scheduler_core.strategy import Strategy

_log = logging.getLogger(__name__)

REPORT_S = 1.0
"""Between two reports of a slot."""

KEPT_SLOTS = 1_000
"""Slots whose figures are kept: a request may end long after the slot that it arrived in."""


class _Side:
    """What is known of one arm in one slot."""

    def __init__(self) -> None:
        self.report = ArmReport()
        """Its requests and waits are of those that have ended."""
        self.took = Counter[int]()
        """How long decisions took, by bucket."""

    def wait(self, waited_s: float) -> None:
        """Take in how long a request waited."""
        self.report.worst_wait_s = max(self.report.worst_wait_s, waited_s)


class _Slots:
    """What is known of each slot of an experiment."""

    def __init__(self) -> None:
        self._sides: dict[float, dict[bool, _Side]] = {}
        self._unhealthy: set[float] = set()
        self._touched: set[float] = set()

    def side(self, slot: Slot, challenger: bool) -> _Side:
        """One arm of a slot, of which something will be told."""
        self._touched.add(slot.start_s)
        if slot.start_s not in self._sides and len(self._sides) >= KEPT_SLOTS:
            del self._sides[next(iter(self._sides))]
        sides = self._sides.setdefault(slot.start_s, {})
        if challenger not in sides:
            sides[challenger] = _Side()
        return sides[challenger]

    def lost_health(self, slot: Slot) -> None:
        """An instance that served the challenger was lost."""
        self.side(slot, True)
        self._unhealthy.add(slot.start_s)

    def touched(self) -> Iterator[SlotReport]:
        """Reports of the slots of which something has changed since the last call."""
        for start_s in sorted(self._touched & self._sides.keys()):
            arms = {challenger: _reported(side) for challenger, side in self._sides[start_s].items()}
            yield SlotReport(start_s, arms.get(False), arms.get(True), start_s not in self._unhealthy)
        self._touched.clear()


def _reported(side: _Side) -> ArmReport:
    return structs.replace(side.report, decision_p99_us=_p99_us(side.took))


class Player:
    """Lets the arm decide whose turn it is.

    Args:
        champion: what runs until the control plane is heard.
        key: `service.schedule_key`; empty: no schedule can be checked, so the champion serves everyone.
        calls: requests that have not ended.
        report: told the id of the experiment and what is known of a slot, again and again.
    """

    def __init__(
        self,
        champion: Strategy,
        key: bytes,
        scheduler: Scheduler,
        calls: Mapping[int, Call],
        report: Callable[[str, SlotReport], None],
    ) -> None:
        self.clock = Clock()
        self.refused = 0
        """Answers of the control plane that could not be used."""
        self._key = key
        self._arms = Arms(champion, key)
        self._scheduler = scheduler
        self._calls = calls
        self._report = report
        self._heard = asyncio.Event()
        self._problem = ""
        self._known: Running | None = None
        self._slots = _Slots()
        self._collected_s = 0.0
        self._told_s = 0.0
        self._failures: dict[Decider, tuple[int, int]] = {}

    @property
    def pulled(self) -> bool:
        """Whether the control plane has been heard."""
        return self._arms.generation >= 0

    @property
    def experiment(self) -> str:
        """The id of the experiment that it takes part in now; empty without one."""
        running = self._arms.running(self.clock.now_s())
        return running.experiment.id if running is not None and self._plays(running) else ""

    @property
    def divides(self) -> bool:
        """Whether sessions belong to parts of the fleet."""
        return self._known is not None and self._known.experiment.design != "switchback"

    def configure(self, champion: Strategy) -> None:
        """Take another strategy until the control plane is heard."""
        if not self.pulled:
            self._arms = Arms(champion, self._key)
            self.turn()

    def hear(self, active: Active) -> None:
        """Take in what the control plane says is active."""
        self.clock = Clock(active.clock_scale)
        try:
            _check_installed(active)
            self._arms.pulled(active, self.clock.now_s())
        except InputError as problem:
            self.refused += 1
            if str(problem) != self._problem:
                self._problem = str(problem)
                _log.warning("what the control plane says is active cannot be run as told: %s", problem)
        known = self._arms.known
        if known is None or self._known is None or known.experiment.id != self._known.experiment.id:
            self._collect()
            self._begin(known)
        elif self._plays(known):
            self._known = known  # its schedule goes on
        self.turn()
        self._heard.set()

    async def run(self) -> None:
        """Take turns and report until cancelled."""
        while True:
            self.turn()
            self._tell()
            now_s = self.clock.now_s()
            wait_s = min((mark - now_s) / self.clock.scale for mark in self._marks(now_s))
            try:
                async with asyncio.timeout(wait_s):
                    await self._heard.wait()
            except TimeoutError:
                continue
            self._heard.clear()

    def turn(self) -> None:
        """Let those decide whose turn it is."""
        self._collect()
        now_s = self.clock.now_s()
        running, champion = self._arms.running(now_s), self._arms.champion.strategy
        design = None if running is None else running.experiment.design
        if design == "switchback":
            self._scheduler.adopt(self._arms.of_pool(now_s).strategy)
        elif design == "pools" and self._scheduler.can_divide():
            self._scheduler.adopt(*(self._arms.of_pool(now_s, pool).strategy for pool in (0, 1)))
        elif running is not None and design == "sticky" and (share := self._own_share(running, now_s)):
            self._scheduler.adopt(champion, running.challenger.strategy, share=share)
        else:
            self._scheduler.adopt(champion)

    def divide(self, call: Call, headers: Headers) -> None:
        """Say which session and which part of the fleet a request belongs to; without a session it is its own."""
        told = headers.get(b"x-kairos-session", b"")
        call.session = self._arms.session_hash(told.decode("latin-1") or call.request_id)
        if self._known is not None and self._known.experiment.design == "sticky":
            call.part = int(self._arms.of_session(call.session, self.at(call.arrival_s)).challenger)
        else:
            call.part = self._arms.pool_of(call.session)

    # -- what came of it

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Count a request that has ended."""
        if self._known is None or (found := self._place_of(call, self._known)) is None:
            return
        side, counts = found
        side.report.requests += counts
        if outcome is not Outcome.REFUSED:
            side.wait(_waited_s(call, time.monotonic()))

    def lost(self, instance: LiveInstance) -> None:
        """An instance does not answer any more."""
        known = self._known
        if known is None or (slot := known.schedule.slot_at(self.clock.now_s())) is None:
            return
        if self._scheduler.decider_at(instance).strategy.name == known.schedule.challenger:
            self._slots.lost_health(slot)

    def at(self, monotonic_s: float) -> float:
        """An instant of this process, on the clock of experiments."""
        return self.clock.at(time.time() - (time.monotonic() - monotonic_s))

    # -- parts

    def _begin(self, known: Running | None) -> None:
        """Begin with another experiment, or with none."""
        self._known = known if known is not None and self._plays(known) else None
        self._scheduler.decided = None if self._known is None else []
        self._slots = _Slots()

    def _own_share(self, running: Running, now_s: float) -> float | None:
        """`sticky`: the share of instances that are the challenger's; None while they cannot be divided so."""
        slot = running.schedule.slot_at(now_s)
        if slot is None or not self._scheduler.has_share(slot.share) or not self._scheduler.can_divide(slot.share):
            return None
        return slot.share

    @staticmethod
    def _plays(running: Running) -> bool:
        return running.experiment.design in ("switchback", "pools", "sticky")

    def _challenger_at(self, at_s: float, part: int, known: Running) -> bool:
        """Whether the coin gave a part of the fleet (or all of it), or a session that goes there, to the challenger."""
        if known.experiment.design == "sticky":
            return part == 1
        pool = part if known.experiment.design == "pools" else 0
        return known.schedule.strategy_at(at_s, pool) == known.schedule.challenger

    def _place_of(self, call: Call, known: Running) -> tuple[_Side, bool] | None:
        """The side of the slot that a request arrived in, and whether it counts."""
        arrived_s = self.at(call.arrival_s)
        slot = known.schedule.slot_at(arrived_s)
        if slot is None:
            return None
        lengths = known.experiment.lengths
        counts = slot.start_s + lengths.burn_s <= arrived_s < slot.end_s - lengths.tail_s
        return self._slots.side(slot, self._challenger_at(arrived_s, call.part, known)), counts

    def _collect(self) -> None:
        """Add what was decided, and what failed, since the last time."""
        now_s = self.clock.now_s()
        since_s, self._collected_s = self._collected_s, now_s
        before, self._failures = self._failures, {d: _failures_of(d) for d in self._scheduler.deciders}
        known, decided = self._known, self._scheduler.decided
        if known is None or decided is None:
            return
        self._scheduler.decided = []
        for decision in decided:
            at_s = self.at(decision.at_s)
            if (slot := known.schedule.slot_at(at_s)) is not None:
                challenger = self._challenger_at(at_s, decision.part, known)
                side = self._slots.side(slot, challenger)
                side.report.decisions += 1
                if at_s >= slot.start_s + known.experiment.lengths.burn_s:
                    side.report.counted_decisions += 1
                    side.report.wrong_arm += (decision.strategy == known.schedule.challenger) != challenger
                side.took[_bucket(decision.took_us)] += 1
        slot = known.schedule.slot_at(since_s)
        for decider, (fallbacks, exceptions) in self._failures.items():
            fallbacks_before, exceptions_before = before.get(decider, (0, 0))
            if slot is not None and fallbacks > fallbacks_before:
                side = self._slots.side(slot, decider.strategy.name == known.schedule.challenger)
                side.report.fallbacks += fallbacks - fallbacks_before
                side.report.exceptions += exceptions - exceptions_before

    def _tell(self) -> None:
        """Report the slots of which something has changed; requests that have not ended are in their slot's report."""
        known = self._known
        if known is None or time.monotonic() < self._told_s + REPORT_S:
            return
        self._told_s = time.monotonic()
        present = Counter[_Side]()
        for call in self._calls.values():
            if (found := self._place_of(call, known)) is not None:
                side, counts = found
                side.wait(_waited_s(call, self._told_s))
                present[side] += counts
        for side, count in present.items():
            side.report.requests += count
        for report in self._slots.touched():
            self._report(known.experiment.id, report)
        for side, count in present.items():
            side.report.requests -= count

    def _marks(self, now_s: float) -> Iterator[float]:
        """Instants at which there is something to do, the next of each kind."""
        yield now_s + REPORT_S * self.clock.scale
        known = self._arms.known
        if known is not None:
            edges = (edge_s for slot in known.schedule.slots for edge_s in (slot.start_s, slot.end_s))
            yield from (edge_s for edge_s in edges if edge_s > now_s)
            if self._arms.trusted_until_s > now_s:
                yield self._arms.trusted_until_s


def _check_installed(active: Active) -> None:
    """Raise InputError when a policy is told by its place in a module: nobody may import what they like from afar."""
    versions = [active] if active.experiment is None else [active, active.experiment.challenger]
    for version in versions:
        for choice in version.policies.values():
            if ":" in choice.name:
                raise InputError(f"policy {choice.name} of {version.known_as} is not installed here under a name")


def _waited_s(call: Call, now_s: float) -> float:
    """How long a request has waited for its turn, or did."""
    return (call.dispatch_s or now_s) - call.arrival_s


def _failures_of(decider: Decider) -> tuple[int, int]:
    """All failures of its policies, and those that they raised themselves."""
    fallbacks = decider.validity.fallbacks
    return fallbacks.total(), exceptions_among(fallbacks)


def _bucket(took_us: float) -> int:
    """Durations that differ by less than 5 % share a bucket.

    >>> _bucket(100.0), _bucket(102.0)
    (93, 93)
    """
    return math.ceil(math.log(max(took_us, 1.0)) * 20)


def _p99_us(took: Counter[int]) -> float:
    """The upper end of the bucket in which the 99th percentile lies; 0 without any.

    >>> round(_p99_us(Counter({93: 99, 120: 1})))
    105
    """
    left = math.ceil(0.99 * took.total())
    for bucket in sorted(took):
        left -= took[bucket]
        if left <= 0:
            return math.exp(bucket / 20)
    return 0.0
