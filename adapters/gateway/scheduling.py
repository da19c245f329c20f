"""Who runs next and where: the active strategy's Decider over the live fleet, asked as late as possible.

Requests wait here, in front of each prefill instance, which has a bounded number of prompts at a time. A decision
counts as load at once. Everything runs in the event loop's thread; nothing here waits.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Set
from typing import NamedTuple

from kairos.adapters.gateway.calls import Call, Met
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.instances import DecodeSide, LiveInstance, PrefillSide, resident_of
from kairos.adapters.gateway.pools import Pool, Views, side_of, waiting_of
from kairos.scheduler_core.config import Guards
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.decision import PrefillDecision
from kairos.scheduler_core.domain import Waiting
from kairos.scheduler_core.policy import AdmissionView, DecodePlacementView, PrefillPlacementView
from kairos.scheduler_core.strategy import Strategy, not_applied

_TIMER_S = 0.001
"""An event loop's timers may be so much too early."""
_SOON_S = 1
"""Retry-After where nothing better is known."""
_HALF = 0.5


class Decided(NamedTuple):
    """A prompt that was sent to an instance."""

    at_s: float
    took_us: float
    """All decisions about it so far."""
    part: int
    strategy: str


class Scheduler:
    """The queues of the gateway.

    Args:
        clock: seconds, monotonic.
        max_waiting: requests that may wait.

    Raises:
        UnknownPolicyError, ConfigError: the strategy cannot be built.
    """

    def __init__(self, strategy: Strategy, guards: Guards, clock: Callable[[], float], max_waiting: int) -> None:
        self._guards = guards
        self._clock = clock
        self._max_waiting = max_waiting
        self.deciders = [self._decider(strategy)]
        """One for the whole fleet, or one for each part of it."""
        self._share = _HALF
        """Of the instances of each role that are the second part, where the fleet is divided."""
        self.decided: list[Decided] | None = None
        """What was decided, for who wants to know and empties it."""
        self.instances: dict[str, LiveInstance] = {}
        self.waiting: dict[int, Call] = {}
        """By number, so in order of arrival."""
        self.pools: list[Pool] = []
        self.prefix_sides: list[PrefillSide] = []
        """Those whose prefix caches are known, by what was sent there or by their own word."""
        self._fallbacks_before = Counter[str]()
        self._dispatches = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = float("inf")

    @property
    def decider(self) -> Decider:
        """Of the whole fleet, or of its first part."""
        return self.deciders[0]

    def decider_of(self, part: int) -> Decider:
        """What decides in a part of the fleet (0 or 1), or in the fleet where it is not divided."""
        return self.deciders[part % len(self.deciders)]

    def decider_at(self, instance: LiveInstance) -> Decider:
        """What decides about the prompts of an instance."""
        return self.deciders[0] if len(self.deciders) == 1 else self.deciders[self.part_of(instance)]

    def part_of(self, instance: LiveInstance) -> int:
        """The part of the fleet (0 or 1) that an instance belongs to where it is divided."""
        return _part(instance.number, self._share)

    def _decider(self, strategy: Strategy) -> Decider:
        return Decider(strategy, self._guards.deferred_share, self._guards.decision_budget_s)

    @property
    def fallbacks(self) -> Counter[str]:
        """Decisions in which arrival order or the least load replaced a policy, by policy and error."""
        return sum((decider.validity.fallbacks for decider in self.deciders), self._fallbacks_before)

    def notes(self) -> list[str]:
        """What the strategy asks for that a gateway cannot carry out."""
        prefill = [i.prefill.instance.control for i in self.instances.values() if i.prefill]
        decode = [i.decode.instance.control for i in self.instances.values() if i.decode]
        notes = [note for decider in self.deciders for note in not_applied(decider.strategy, prefill, decode)]
        return list(dict.fromkeys(notes))

    # -- the fleet and the strategy

    def rebuild(self) -> None:
        """Lay the queues out anew: an instance came, went or changed its state.

        What waits is placed again, in order of arrival; what nothing can serve any more ends.
        """
        self._lay_out({instance.instance_id for pool in self.pools for instance in pool.instances})

    def adopt(self, *strategies: Strategy, share: float = _HALF) -> None:
        """Decide from now on by another strategy, or by one in each part of the fleet; by those in force goes on.

        Args:
            share: of the instances of each role that are the second part.

        Raises:
            UnknownPolicyError, ConfigError: one cannot be built; the old ones stay.
        """
        before = self.deciders
        if [decider.strategy for decider in before] == list(strategies) and share == self._share:
            return
        as_before = before if len(before) == len(strategies) else ()
        deciders = [self._decider(strategy) for strategy in strategies]
        for part, old in enumerate(as_before):
            if old.strategy == strategies[part]:
                deciders[part] = old
        for old in before:
            if old not in deciders:
                self._fallbacks_before += old.validity.fallbacks
        going_on = [i for pool in self.pools if pool.decider in deciders for i in pool.instances]
        kept = {i.instance_id for i in going_on if _part(i.number, share) == self.part_of(i)}
        self.deciders, self._share = deciders, share
        self._lay_out(kept)

    def can_divide(self, share: float = _HALF) -> bool:
        """Whether each part of the fleet, a share of each role and the rest, serves all that the fleet does."""
        whole = frozenset[str]().union(*(self._servable(i, None) for i in self.instances.values()))
        served: list[set[str]] = [set(), set()]
        for instance in self.instances.values():
            served[_part(instance.number, share)] |= self._servable(instance, share)
        return bool(whole) and all(part == whole for part in served)

    def has_share(self, share: float) -> bool:
        """Whether exactly that share of the instances of each role would be the second part."""
        roles = Counter(instance.role for instance in self.instances.values())
        second = Counter(i.role for i in self.instances.values() if _part(i.number, share))
        return all(math.isclose(second[role], share * count) for role, count in roles.items())

    def _lay_out(self, kept: Set[str]) -> None:
        pools: dict[tuple[int, frozenset[str], bool, str], Pool] = {}
        divided = len(self.deciders) > 1
        for instance in self.instances.values():
            if serves := self._servable(instance, self._share if divided else None):
                mixed, part = instance.role == "mixed", self.part_of(instance) if divided else 0
                key = part, serves, mixed, instance.engine
                pool = pools.setdefault(key, Pool(serves, mixed, instance.engine, self.decider_of(part), part))
                pool.instances.append(instance)
        self.pools = list(pools.values())
        sides = [instance.prefill for pool in self.pools for instance in pool.instances if instance.prefill is not None]
        self.prefix_sides = [side for side in sides if side.knows_prefixes]
        for pool in self.pools:
            pool.open(kept)
        for call in sorted(self.waiting.values(), key=lambda call: call.number):
            try:
                pool = self._pool(call)
                views, now_s = pool.views(call), self._clock()
                pool.add(views, self._placed(pool, views, now_s), now_s)
            except CallError as problem:
                del self.waiting[call.number]
                _resolve(call, problem)
        self.stir()

    def _servable(self, instance: LiveInstance, share: float | None) -> frozenset[str]:
        """Models that prompts sent there can be served for, to their last token; share None: anywhere in the fleet."""
        if not instance.is_ready or instance.prefill is None:
            return frozenset()
        if instance.role == "mixed":
            return instance.serves
        decodes: set[str] = set()
        for other in self.instances.values():
            together = share is None or _part(other.number, share) == _part(instance.number, share)
            if other.role == "decode" and other.is_ready and other.handshake == instance.handshake and together:
                decodes |= other.serves
        return instance.serves & decodes

    # -- the life of a request

    def arrive(self, call: Call) -> None:
        """Take a request in: admission, placement; it may be dispatched at once.

        Raises:
            CallError: it is refused.
        """
        decider = self.decider_of(call.part)
        call.strategy = decider.strategy.name
        pool = self._pool(call)
        if len(self.waiting) >= self._max_waiting:
            raise CallError(429, "too_many_waiting", f"{self._max_waiting} requests wait already", _SOON_S)
        now_s = self._clock()
        started_ns = time.perf_counter_ns()
        views = pool.views(call)
        if not decider.accepts_all:
            self._admit(pool, views, now_s)
        call.predicted_ttft_s = now_s - call.arrival_s + pool.roughly_s(views, now_s)
        place = self._placed(pool, views, now_s)
        if not self.waiting and (instance := pool.at_once(place, now_s)) is not None:
            request = views[instance.instance_id]
            pool.decider.prefill_started_at_once(side_of(instance).lane, request)
            self._send(pool, instance, call, request, now_s, started_ns)
            return
        pool.add(views, place, now_s)
        self.waiting[call.number] = call
        call.decision_us += (time.perf_counter_ns() - started_ns) / 1e3
        self.stir(pool)

    def again(self, call: Call) -> None:
        """Let a request that failed before its first token wait once more, elsewhere if there is another place.

        It was admitted already.

        Raises:
            CallError: nothing can serve it any more.
        """
        self.release(call)
        call.prefill = call.decode = None
        pool = self._pool(call)
        others = [i for i in pool.instances if i.instance_id not in call.failed_on] or pool.instances
        place = min(others, key=lambda instance: side_of(instance).free_at_s)
        pool.add(pool.views(call), place.instance_id, self._clock())
        self.waiting[call.number] = call
        self.stir(pool)

    def stir(self, only: Pool | None = None) -> None:
        """Let every instance that has room decide; the one that is free first before the others."""
        for pool in self.pools if only is None else (only,):
            asked: set[str] = set()
            while self.waiting and (instance := pool.able(now_s := self._clock(), asked)) is not None:
                side = side_of(instance)
                started_ns = time.perf_counter_ns()
                decision = pool.decider.next_prefill(side.lane, now_s, pool.peers(side, now_s))
                if decision is None:
                    asked.add(instance.instance_id)
                else:
                    self._dispatch(pool, instance, decision, now_s, started_ns)
            if self.waiting:
                self._stir_at(pool.next_room_s(now_s))

    def _stir_at(self, at_s: float) -> None:
        """Look again at a time, if not before."""
        if at_s >= self._alarm_s:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = at_s
        after_s = max(0.0, at_s - self._clock()) + _TIMER_S
        self._alarm = asyncio.get_running_loop().call_later(after_s, self._alarmed)

    def _alarmed(self) -> None:
        self._alarm, self._alarm_s = None, float("inf")
        for instance in self.instances.values():
            if instance.prefill is not None:
                self._end_unseen(instance.prefill)
        self.stir()

    def _end_unseen(self, side: PrefillSide) -> None:
        """Take those for done whose end nobody sees and is past, as predicted."""
        now_s = self._clock()
        while side.unseen:
            call = next(iter(side.unseen.values()))
            if (ends_s := side.flights[call.number]) > now_s:
                self._stir_at(ends_s)
                return
            self.prefill_ended(call)

    def prefill_ends_unseen(self, call: Call, instance: LiveInstance) -> None:
        """Nobody will see the prompt of a request end: it takes as long as predicted."""
        side = side_of(instance)
        side.unseen[call.number] = call
        self._stir_at(side.flights[call.number])

    def prefill_ended(self, call: Call) -> None:
        """A prompt is done, or given up; another may take its place."""
        instance = call.prefill
        if instance is None or instance.prefill is None or call.number not in instance.prefill.flights:
            return
        side = instance.prefill
        seconds, tokens = side.end(call, self._clock())
        self.decider_at(instance).prefill_ended(side.lane, seconds, tokens, (call.number,))
        if self.waiting:
            self.stir()

    def place_decode(self, call: Call) -> DecodeSide:
        """The decode instance of a request, and count it there.

        Raises:
            CallError: there is none.
        """
        assert call.prefill is not None
        handshake = call.prefill.handshake
        able = [
            instance
            for instance in self.instances.values()
            if instance.role == "decode"
            and instance.is_ready
            and instance.handshake == handshake
            and call.model in instance.serves
        ]
        if not able:
            raise CallError(503, "no_instance", "no decode instance answers", _SOON_S)
        if len(self.deciders) > 1:
            able = [instance for instance in able if self.part_of(instance) == call.part] or able
        able = [instance for instance in able if instance.instance_id not in call.failed_on] or able
        started_ns = time.perf_counter_ns()
        place = able[0]
        if len(able) > 1:
            loads = [instance.decode.load() for instance in able if instance.decode is not None]
            now_s = self._clock()
            name = self.decider_of(call.part).place_decode(DecodePlacementView(now_s, resident_of(call, now_s), loads))
            place = self.instances[name]
        call.decision_us += (time.perf_counter_ns() - started_ns) / 1e3
        assert place.decode is not None
        call.decode = place
        place.decode.expect(call)
        return place.decode

    def release(self, call: Call) -> None:
        """A request ended, however: it counts nowhere any more. More than once is once."""
        if self.waiting.pop(call.number, None) is not None:
            for pool in self.pools:
                pool.take(call.number, started=False)
        self.prefill_ended(call)
        if call.decode is not None and call.decode.decode is not None:
            call.decode.decode.leave(call)

    # -- parts

    def _pool(self, call: Call) -> Pool:
        """The least busy pool that can take a request."""
        able = [pool for pool in self.pools if call.model in pool.serves and call.body.engine in ("", pool.engine)]
        if len(self.deciders) > 1:
            able = [pool for pool in able if pool.part == call.part] or able
        if call.text.sequences > 1 and able:
            able = [pool for pool in able if pool.mixed]
            if not able:
                raise CallError(
                    400,
                    "several_sequences",
                    "n, best_of and lists of prompts cannot be handed from prefill to decode; send one request each",
                )
        if not able:
            if all(call.model not in instance.serves for instance in self.instances.values()):
                raise CallError(404, "model_not_found", f"the model '{call.model}' does not exist")
            raise CallError(503, "no_instance", f"no instance that serves '{call.model}' answers now", _SOON_S)
        if len(able) == 1:
            return able[0]
        return min(able, key=lambda pool: pool.waiting_requests() / len(pool.instances))

    def _admit(self, pool: Pool, views: Views, now_s: float) -> None:
        predicted_ttft_s = pool.predicted_ttft_s(views, now_s) if pool.decider.needs_prediction else float("nan")
        first = next(iter(views.values()))
        answer = pool.decider.admit(AdmissionView(now_s, first, predicted_ttft_s, pool.waiting_requests()))
        if not answer.accept:
            message = "refused on arrival: " + answer.reason.replace("_", " ")
            raise CallError(answer.status, answer.reason, message, answer.retry_after_s or _SOON_S)

    def _placed(self, pool: Pool, views: Views, now_s: float) -> str | None:
        """The instance that a request is bound to; None: none yet, or there is but one."""
        if len(pool.instances) == 1:
            return None
        first = next(iter(views.values()))
        return pool.decider.place_prefill(PrefillPlacementView(now_s, first, pool.loads(views, now_s)))

    def _dispatch(
        self, pool: Pool, instance: LiveInstance, decision: PrefillDecision, now_s: float, started_ns: int
    ) -> None:
        """Send the first of a decision: a gateway sends whole prompts, one at a time."""
        side = side_of(instance)
        pool.decider.prefill_started(side.lane, decision)
        request = decision.requests[0]
        number = request.request_id
        assert isinstance(number, int)
        call = self.waiting.pop(number)
        pool.take(number, started=True)
        fresh = waiting_of(call, side) if side.knows_prefixes else request
        self._send(pool, instance, call, fresh, now_s, started_ns)

    def _send(
        self, pool: Pool, instance: LiveInstance, call: Call, request: Waiting, now_s: float, started_ns: int
    ) -> None:
        side = side_of(instance)
        call.prefill = instance
        call.dispatch_s = now_s
        self._dispatches += 1
        call.dispatch_rank = self._dispatches
        call.met = _met(instance)
        call.expected_cached_tokens = request.cached_tokens
        if side.index is not None:
            side.index.use(call.blocks)
        side.send(call, request.prefill_s, now_s)
        if instance.role == "mixed" and instance.decode is not None:
            call.decode = instance
            instance.decode.expect(call)
        call.decision_us += (time.perf_counter_ns() - started_ns) / 1e3
        if self.decided is not None:
            self.decided.append(Decided(now_s, call.decision_us, call.part, pool.decider.strategy.name))
        _resolve(call)


def _part(number: int, share: float) -> int:
    """1 for a share of all numbers, evenly spread: with a half for every other one.

    >>> [_part(number, 0.25) for number in range(8)]
    [0, 0, 0, 1, 0, 0, 0, 1]
    """
    before, after = (math.floor(count * share + 1e-9) for count in (number, number + 1))
    return after - before


def _resolve(call: Call, problem: CallError | None = None) -> None:
    """Tell the task of a request that its turn has come, or never will."""
    if call.turn is None or call.turn.done():
        return
    if problem is None:
        call.turn.set_result(None)
    else:
        call.turn.set_exception(problem)


def _met(instance: LiveInstance) -> Met:
    side, decode = side_of(instance), instance.decode
    return Met(
        len(side.flights) + (len(decode.residents) if decode else 0),
        len(side.lane.own) + (0 if side.lane.shared is None else len(side.lane.shared)),
        side.sum_tokens,
        decode.sum_context_tokens if decode else 0,
        instance.scraped.kv_usage_share,
    )
