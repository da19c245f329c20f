"""`schedule`: a snapshot in, decisions out. The same Decider and policies as in simulator, gateway and engine."""

import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.errors import ConfigError, UnknownNameError
from kairos.scheduler_core.policy import DecodeStep, Observer
from kairos.scheduler_core.service.checking import check_snapshot
from kairos.scheduler_core.service.decode import DecodeStage
from kairos.scheduler_core.service.memory import (
    LaneMemory,
    Memory,
    PoolMemory,
    read_memory,
    unusable_state,
    write_memory,
)
from kairos.scheduler_core.service.plan import plan
from kairos.scheduler_core.service.prefill import PrefillStage, no_instance
from kairos.scheduler_core.service.profiles import Profiles
from kairos.scheduler_core.service.schemas import Answer, Snapshot
from kairos.scheduler_core.slo import NO_TARGET_S
from kairos.scheduler_core.strategy import Strategy, not_applied, parse_strategy


class Decided(NamedTuple):
    """A snapshot and what was decided for it."""

    at_s: float
    """UTC epoch seconds, whatever the origin of the snapshot's times."""
    snapshot: Snapshot
    answer: Answer
    strategy: Strategy
    failures: list[str]
    """Policies that failed and were replaced, as `policy: error`."""
    decision_s: float
    """How long it took."""


Targets = Mapping[str, tuple[float, float]]
"""TTFT and TPOT targets by class."""


class Scheduler:
    """Answers snapshots; keeps nothing between two of them.

    Raises:
        ConfigError, UnknownPolicyError: a configured strategy or profile cannot be loaded.
    """

    def __init__(self, settings: Settings, strategies: Mapping[str, Strategy]) -> None:
        self.strategies = strategies
        """By name. This, `active` and `profiles` are replaced whole while the service runs, never changed."""
        self.active = settings.active
        self.watchers: tuple[Callable[[Decided], None], ...] = ()
        """Told of every decision, before it is answered: they must be quick."""
        self.logged_s: dict[str, float] = {}
        """When the failure of each policy was last logged."""
        self.configure(settings, Profiles(settings))

    def configure(self, settings: Settings, profiles: Profiles) -> None:
        """Take promises, guards, handover and profiles in place of those before; a decision under way keeps its own."""
        self.settings = settings
        self.profiles = profiles
        self.targets: Targets = {
            name: (slo_class.ttft_s or NO_TARGET_S, slo_class.tpot_s or NO_TARGET_S)
            for name, slo_class in settings.slo.classes.items()
        }

    def schedule(self, snapshot: Snapshot, now_s: float, body: bytes) -> Answer:
        """The decisions for a snapshot.

        Args:
            now_s: UTC epoch seconds: the instant, where the snapshot does not name it.
            body: the snapshot as it came; the decision id is made of it.

        Raises:
            FieldsError, TooLargeError, UnknownNameError, ConfigError: the snapshot cannot be used.
        """
        began_s = time.perf_counter()
        targets = self.targets
        check_snapshot(snapshot, targets, self.settings.service.max_requests)
        told_s = snapshot.now_s
        strategy = self.strategy(snapshot.strategy)
        run = _Run(self, targets, snapshot, strategy, now_s if told_s is None else told_s)
        answer = run.answer(_decision_id(body, strategy, now_s if told_s is None else None))
        failures = list(run.decider.validity.fallbacks)
        decided = Decided(now_s, snapshot, answer, strategy, failures, time.perf_counter() - began_s)
        for watch in self.watchers:
            watch(decided)
        return answer

    def strategy(self, text: str | None) -> Strategy:
        """The active strategy, one of the configuration by name, or one made of installed policies.

        Raises:
            UnknownNameError, ConfigError: there is none, or it takes other parameters.
        """
        name = text or self.active
        known = self.strategies.get(name)
        if known is not None:
            return known
        if "+" not in name:
            raise UnknownNameError("strategy", name, self.strategies)
        if ":" in name:
            raise ConfigError(
                f"strategy '{name}' names a module; a request may use installed policies only: "
                "put it under a name in the configuration"
            )
        return parse_strategy(name).check()


class _Run:
    """The working of one snapshot."""

    def __init__(
        self, scheduler: Scheduler, targets: Targets, snapshot: Snapshot, strategy: Strategy, now_s: float
    ) -> None:
        self.settings, self.profiles = scheduler.settings, scheduler.profiles
        self.snapshot, self.strategy, self.now_s = snapshot, strategy, now_s
        self.decider = Decider(strategy, self.settings.guards.deferred_share)
        self.decider.validity.logged_s = scheduler.logged_s
        self.prefill = PrefillStage(self.decider, targets.__getitem__, now_s)
        self.decode = DecodeStage(self.decider, targets.__getitem__, now_s)
        self.warnings: list[str] = []
        self.versions: dict[str, str] = {}

    def answer(self, decision_id: str) -> Answer:
        """Set everything up, decide, then predict the rest."""
        snapshot, handover = self.snapshot, self.settings.fleet.handover
        memory = self._memory()
        self._add_instances()
        for kind, policy in self.decider.fleet_policies.items():
            self._load(policy, memory.fleet.get(kind, ""))
        self.prefill.add_running(snapshot.running)
        self.prefill.add_waiting(snapshot.waiting, self.decode.serves)
        self.prefill.open_queues()
        self.decode.add_residents(snapshot.resident)
        self.decode.expect_dispatched(snapshot.waiting)
        self.decode.expect_dispatched(snapshot.running)
        self._recall(memory)
        self._learn()
        starts = self.prefill.start_idle()
        if handover.place_decode == "at_dispatch":
            told = {request.request_id: request for request in snapshot.waiting}
            for start in starts:
                if not start.request.prefilled_tokens:
                    self.decode.place_dispatched(told[start.request.request_id])
        self.decode.add_transferred(snapshot.transferred, handover.place_decode == "at_ready")
        batches = self.decode.decide()
        state = self._state()
        answers = plan(self.prefill, starts, {request.request_id for request in snapshot.running})
        unserved = [no_instance(request.request_id, request.model) for request in self.decode.unserved]
        self._note()
        return Answer(
            decision_id,
            self.strategy.name,
            answers,
            batches,
            self.decode.placements,
            self.prefill.rejected + unserved,
            self.versions,
            self.warnings,
            state,
        )

    # -- what the snapshot says

    def _add_instances(self) -> None:
        cached_apart = any(request.cached_tokens_by_instance for request in self.snapshot.waiting)
        for told in self.snapshot.instances:
            known = self.profiles.find(told.profile)
            if told.profile not in self.versions:
                self.versions[told.profile] = known.version
                if not self.profiles.knows(told.profile):
                    self.warnings.append(
                        f"profile '{told.profile}' is not configured: step times of the closest, '{known.name}'"
                    )
                if known.note:
                    self.warnings.append(known.note)
            serves = frozenset(told.serves or [known.model])
            if told.role == "decode":
                self.decode.add_instance(told, serves, known.step_times)
            else:
                own_cache = told.instance_id if cached_apart else ""
                group = (known.name, told.chunk_tokens, own_cache)
                self.prefill.add_instance(told, serves, known.step_times, group)

    def _learn(self) -> None:
        """Show the steps that ended to share guards and to policies that learn from them."""
        for step in self.snapshot.ended_steps:
            if step.instance_id in self.prefill.desks:
                lane = self.prefill.desks[step.instance_id][1].lane
                self.decider.prefill_ended(lane, step.seconds, step.new_tokens, ())
            elif isinstance(policy := self.decode.batches[step.instance_id].policy, Observer):
                self.decider.decode_ended(
                    policy,
                    DecodeStep(step.seconds, step.batch_size, step.sum_context_tokens, step.longest_context_tokens),
                )

    # -- memory

    def _memory(self) -> Memory:
        """What the last answer handed out; nothing when that was another strategy's."""
        if not self.snapshot.state:
            return Memory(self.strategy.text)
        memory = read_memory(self.snapshot.state)
        if memory.strategy != self.strategy.text:
            self.warnings.append("state is of another strategy and was not used")
            return Memory(self.strategy.text)
        return memory

    def _recall(self, memory: Memory) -> None:
        for pool in self.prefill.pools:
            shared = memory.pools.get(pool.key, PoolMemory())
            if self.prefill.shares_rule:
                self._load(pool.desks[0].lane.rule.policy, shared.rule)
            for queue in pool.shared.values():
                queue.latest_started = self._start_key(shared.started)
            for desk in pool.desks:
                own, lane = memory.lanes.get(desk.instance.instance_id, LaneMemory()), desk.lane
                if not self.prefill.shares_rule:
                    self._load(lane.rule.policy, own.rule)
                lane.own.latest_started = self._start_key(own.started)
                lane.guard.bucket_s, lane.guard.pinned = own.bucket_s, own.pinned
                lane.owed = None if own.owed is None else lane.find(own.owed)
        for instance_id, state in memory.decode.items():
            if instance_id in self.decode.batches:
                self._load(self.decode.batches[instance_id].policy, state)

    def _load(self, policy: object, state: str) -> None:
        try:
            self.decider.load_state(policy, state.encode())
        except (msgspec.DecodeError, UnicodeError):
            raise unusable_state() from None

    def _start_key(self, started: tuple[float, RequestId] | None) -> tuple[float, RequestId] | None:
        """A remembered start, unless ids are of another type by now and cannot be compared."""
        ids = type(self.snapshot.waiting[0].request_id) if self.snapshot.waiting else str
        return started if started is not None and isinstance(started[1], ids) else None

    def _state(self) -> str:
        memory = Memory(self.strategy.text)
        for kind, policy in self.decider.fleet_policies.items():
            if state := self._dump(policy):
                memory.fleet[kind] = state
        for pool in self.prefill.pools:
            started = next((queue.latest_started for queue in pool.shared.values()), None)
            rule = self._dump(pool.desks[0].lane.rule.policy) if self.prefill.shares_rule else ""
            if started or rule:
                memory.pools[pool.key] = PoolMemory(rule, started)
            for desk in pool.desks:
                lane = desk.lane
                rule = "" if self.prefill.shares_rule else self._dump(lane.rule.policy)
                owed = None if lane.owed is None else lane.owed.request_id
                kept = LaneMemory(rule, lane.guard.bucket_s, lane.guard.pinned, owed, lane.own.latest_started)
                if kept != LaneMemory():
                    memory.lanes[desk.instance.instance_id] = kept
        for instance_id, batch in self.decode.batches.items():
            if state := self._dump(batch.policy):
                memory.decode[instance_id] = state
        return write_memory(memory)

    def _dump(self, policy: object) -> str:
        try:
            return self.decider.dump_state(policy).decode()
        except TypeError as problem:  # a plugin's, not JSON: it is forgotten, and said so
            self.decider.validity.note(policy, problem)
            return ""

    # -- what the caller should know

    def _note(self) -> None:
        batches = self.decode.batches.values()
        if batches:
            room = max(batch.instance.kv_tokens for batch in batches)
            lengths = [request.prompt_tokens + 1 for request in self.snapshot.waiting]
            lengths += [request.context_tokens for request in self.snapshot.transferred]
            if oversized := sum(length > room for length in lengths):
                self.warnings.append(
                    f"{oversized} requests are longer than any decode instance's KV capacity of {room} tokens; "
                    "each would run alone on an empty instance"
                )
        self.warnings += not_applied(
            self.strategy,
            [desk.instance.control for _, desk in self.prefill.desks.values()],
            [batch.instance.control for batch in batches],
        )
        for failure, count in self.decider.validity.fallbacks.items():
            self.warnings.append(f"policy failed, replaced {count} times: {failure}")


def strategies_of(settings: Settings) -> dict[str, Strategy]:
    """The strategies of a configuration by name, with policies that are there.

    Raises:
        ConfigError, UnknownPolicyError: one cannot be loaded.
    """
    return {name: choice.as_strategy(name).check() for name, choice in settings.strategies.items()}


def _decision_id(body: bytes, strategy: Strategy, now_s: float | None) -> str:
    """The same for the same snapshot, strategy and (where the server's clock was taken) instant."""
    digest = blake2b(body, digest_size=12)
    digest.update(f"{strategy.text} {now_s}".encode())
    return digest.hexdigest()
