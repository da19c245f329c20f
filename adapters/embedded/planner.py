"""What the next step of an engine shall hold: the policies of one strategy, asked and checked by the Decider.

An engine with chunked prefill serves running requests first, then waiting ones, within a budget of tokens. So a plan
says four things: who may come in and in which order, who of the running ones sits this step out, in which order the
running prompts go, and how many tokens the step may have.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from kairos.adapters.embedded.mirror import Entry, Mirror, hold
from kairos.adapters.embedded.time_limit import TimeLimit
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.decision import PrefillDecision, Reason
from kairos.scheduler_core.domain import (
    UNLIMITED_TOKENS,
    DecodeInstance,
    Line,
    Part,
    PrefillInstance,
    RequestId,
    Resident,
    StepTimes,
)
from kairos.scheduler_core.guards import ValidityGuard
from kairos.scheduler_core.policy import DecodeStep, DecodeView, Observer
from kairos.scheduler_core.slo import NO_TARGET_S
from kairos.scheduler_core.strategy import Strategy

HEAD = 64
"""Most requests that an ordering rule is asked to order; a step hardly starts more."""
SHARE_OF_SLACK = 0.5
"""Share of the time until the next token is due that a step with prompt tokens may take.

What is left is a reserve for steps that take longer than predicted. It costs its time once: a decode that has it goes
on with one target a token, whatever the share.
"""
LATE_TARGETS = 20.0
"""A resident that is late by more TPOT targets than this no longer slows prompts down: it will not keep its target."""
EMPTY_STEPS = 2
"""After so many steps without a token, nothing is held: whoever was preferred cannot run."""


class Limits(NamedTuple):
    """What the engine can do at all."""

    step_tokens: int
    """Token budget of a step."""
    least_prompt_tokens: int
    """Prompt tokens that every step may have, however late decodes are."""
    batch_requests: int
    kv_tokens: int
    chunks: bool = True
    """Whether a prompt may be split; otherwise the budget of a step is left alone."""


class Room(NamedTuple):
    """What the engine has left now."""

    requests: int
    """Waiting requests that may start."""
    kv_tokens: int
    """Free KV."""
    decode_tokens: int
    """Tokens of a step in which every resident takes part."""


class StepPlan(NamedTuple):
    """The next step."""

    enter: Sequence[RequestId]
    """Waiting requests, the first to start first."""
    closed: bool
    """Whether no other waiting request may start."""
    held: Sequence[Entry]
    """Running requests that take no part."""
    prompts: Sequence[RequestId]
    """Running prompts in the order of the policy; others go behind them."""
    tokens: int
    """Budget of the step."""


class Planner:
    """The Decider of one engine and the view it decides on.

    Args:
        budget_s: seconds a decision may take.
        longest_hold_s: no request is held longer in a row.
        watch: whether the budget is kept; not where several ranks must decide alike, whatever each of them takes.

    Raises:
        InputError: a policy that is not installed or refuses its parameters.
    """

    def __init__(
        self,
        strategy: Strategy,
        step_times: StepTimes,
        limits: Limits,
        *,
        deferred_share: float,
        budget_s: float,
        longest_hold_s: float,
        watch: bool = True,
    ) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter()
        """What was decided, for `kairos doctor`."""
        self._deferred_share = deferred_share
        self._longest_hold_s = longest_hold_s
        self.limit = TimeLimit(budget_s, watch)
        self.validity = ValidityGuard(budget_s if watch else None)
        """Counts on, whatever Decider is in force."""
        self._empty_steps = 0
        """Steps in a row that held no token."""
        self._entering: Sequence[RequestId] = ()
        self._blocked = False
        """Whether the engine could start none of those whom the last plan let in."""
        self.step_times = step_times
        self.mirror = self.fresh(strategy)

    # -- what is in force

    @property
    def decider(self) -> Decider:
        """The Decider in force."""
        return self.mirror.decider

    def fresh(self, strategy: Strategy) -> Mirror:
        """An empty mirror under a strategy; the caller fills it and sets it.

        Raises:
            InputError: as the class.
        """
        decider = Decider(strategy, self._deferred_share)
        decider.validity = self.validity
        return Mirror(decider, *self._instances())

    def use_step_times(self, step_times: StepTimes, now_s: float) -> None:
        """Predict with other step times from now on."""
        self.step_times = step_times
        self.mirror.with_step_times(*self._instances(), now_s)

    def _instances(self) -> tuple[PrefillInstance, DecodeInstance]:
        limits = self.limits
        return (
            PrefillInstance("engine", self.step_times, limits.step_tokens, limits.batch_requests),
            DecodeInstance("engine", self.step_times, limits.batch_requests, limits.kv_tokens, limits.batch_requests),
        )

    # -- the next step

    def plan(self, entries: Mapping[RequestId, Entry], room: Room, now_s: float) -> StepPlan | None:
        """The next step; None when the engine shall decide alone."""
        self._entering = ()
        if self._empty_steps >= EMPTY_STEPS:
            self.counts["released steps"] += 1
            return None
        with self.limit:
            mirror = self.mirror
            view = mirror.decode_view(now_s)
            admitted: Sequence[RequestId] = ()
            idle: set[RequestId] = set()
            if view.residents or view.ready:
                decision = self.decider.next_decode(mirror.decode_policy, view)
                self.counts[f"decode {decision.reason}"] += 1
                admitted = [*self._overdue(entries, now_s), *decision.plan.admit]
                idle.update(decision.plan.swap_out)  # no engine swaps: it keeps its KV and sits out
                if decision.plan.step is not None:
                    idle.update(mirror.residents.keys() - set(decision.plan.step))
            tokens = self._token_budget(view, idle, room)
            chosen = None
            if room.requests or mirror.begun:
                chosen = self.decider.next_prefill(mirror.lane, now_s, wanted=self._wanted(room))
        enter: list[RequestId] = list(dict.fromkeys(admitted))
        closed = len(enter) < len(mirror.ready)
        self.counts["admissions held"] += len(mirror.ready) - len(enter)
        prompts: list[RequestId] = []
        paused: list[Entry] = []
        if chosen is not None:
            self.counts[f"prefill {chosen.reason}"] += 1
            closed = closed or (mirror.lane.rule.packs and not self._blocked)
            prompts, starting = self._sorted_out(chosen)
            enter += starting
            paused = self._paused(chosen, starting, prompts, entries, room, tokens)
        self._entering = enter
        held = hold([*(entries[i] for i in idle), *paused], now_s, self._longest_hold_s)
        self._count(held, tokens)
        return StepPlan(enter, closed, held, prompts, tokens)

    def _wanted(self, room: Room) -> int:
        return max(1, min(HEAD, room.requests + len(self.mirror.begun)))

    def _overdue(self, entries: Mapping[RequestId, Entry], now_s: float) -> list[RequestId]:
        """Ready requests that waited as long as may be: the KV of their prompts is not kept for them for ever."""
        overdue = [i for i in self.mirror.ready if now_s - entries[i].arrival_s >= self._longest_hold_s]
        self.counts["overdue"] += len(overdue)
        return overdue

    def _sorted_out(self, chosen: PrefillDecision) -> tuple[list[RequestId], list[RequestId]]:
        """Those of the chosen that run already, and those that wait."""
        begun = self.mirror.begun
        running = [w.request_id for w in chosen.requests if w.request_id in begun]
        return running, [w.request_id for w in chosen.requests if w.request_id not in begun]

    def _paused(
        self,
        chosen: PrefillDecision,
        starting: Sequence[RequestId],
        prompts: Sequence[RequestId],
        entries: Mapping[RequestId, Entry],
        room: Room,
        tokens: int,
    ) -> list[Entry]:
        """Running prompts that yield: those not chosen, and those that would take the tokens of one chosen before them.

        They keep their KV. None yields to a request that has no room to start: it would wait for what they hold.
        """
        if self._blocked or not self.mirror.lane.rule.preempt:
            return []
        if starting and not (room.requests and room.kv_tokens > entries[starting[0]].prompt_tokens):
            return []
        paused = [entry for request_id, entry in self.mirror.begun.items() if request_id not in prompts]
        left = tokens - room.decode_tokens
        waits_before = False
        for request, part in zip(chosen.requests, chosen.parts, strict=True):
            left -= part.new_tokens
            if request.request_id not in self.mirror.begun:
                waits_before = True
            elif waits_before and (left < 0 or part.new_tokens < request.remaining_tokens):
                paused.append(self.mirror.begun[request.request_id])
        return paused

    def _token_budget(self, view: DecodeView, idle: Set[RequestId], room: Room) -> int:
        """Tokens of the step: prompts get what the slack of the decodes in it leaves."""
        limits, mirror = self.limits, self.mirror
        prompts = limits.chunks and (mirror.lane.waits() or mirror.begun)
        if not prompts or view.tightest_tpot_s == NO_TARGET_S:
            return limits.step_tokens
        members, sum_context_tokens = view.residents, view.sum_context_tokens
        if idle:
            members = [r for r in members if r.request_id not in idle]
            sum_context_tokens = sum(r.context_tokens for r in members)
        limit_s = step_limit_s(members, view.now_s)
        if limit_s == math.inf:
            return limits.step_tokens
        decode_s = self.step_times.decode_step_s(len(members), sum_context_tokens)
        context = next((w.context_tokens for w in mirror.lane.own.by_arrival if w.prefilled_tokens), 0)
        prompt = tokens_within(self.step_times.prefill_line, limit_s - decode_s, context)
        return min(limits.step_tokens, room.decode_tokens + max(limits.least_prompt_tokens, prompt))

    def _count(self, held: Sequence[Entry], tokens: int) -> None:
        if held:
            yielding = sum(entry.request_id in self.mirror.begun for entry in held)
            self.counts["yielded prompts"] += yielding
            self.counts["held decodes"] += len(held) - yielding
        if tokens < self.limits.step_tokens:
            self.counts["limited steps"] += 1

    # -- what came of it

    def filled(self, scheduled: Collection[RequestId], tokens_left: bool) -> None:
        """Take in whom the engine put into the step; it may hold nobody, or none of those who were to start.

        A request that was let in may wait for something else (a grammar, an adapter's place, KV), and so may all behind
        it: then the next plan holds the door open.
        """
        self._empty_steps = 0 if scheduled else self._empty_steps + 1
        self._blocked = bool(tokens_left and self._entering) and not any(i in scheduled for i in self._entering)
        self.counts["empty steps"] += not scheduled
        self.counts["blocked steps"] += self._blocked

    def started(self, parts: Sequence[tuple[Entry, Part]]) -> None:
        """Account for the prompts in the step that begins now."""
        waiting = [(w, part) for entry, part in parts if (w := self.mirror.lane.own.get(entry.request_id)) is not None]
        if waiting:
            requests, shares = zip(*waiting, strict=True)
            self.decider.prefill_started(self.mirror.lane, PrefillDecision(requests, shares, Reason.POLICY))

    def ended(
        self,
        seconds: float,
        new_tokens: int,
        done: Iterable[RequestId],
        decode: DecodeStep | None,
    ) -> None:
        """Account for a step that ended."""
        if new_tokens:
            self.decider.prefill_ended(self.mirror.lane, seconds, new_tokens, done)
        if decode is not None and isinstance(self.mirror.decode_policy, Observer):
            self.decider.decode_ended(self.mirror.decode_policy, decode)


def step_limit_s(members: Sequence[Resident], now_s: float) -> float:
    """How long a step may take so that its decodes stay on time, and late ones catch up."""
    limit_s = math.inf
    for r in members:
        target_s = r.tpot_target_s
        slack_s = r.due_s - now_s
        if slack_s < -LATE_TARGETS * target_s:
            continue
        limit_s = min(limit_s, max(slack_s, target_s))
    return SHARE_OF_SLACK * limit_s


def tokens_within(line: Line, seconds: float, context_tokens: int) -> int:
    """Prompt tokens behind `context_tokens` that add at most `seconds` to a step that runs anyway.

    >>> tokens_within(Line(0.01, 1e-4, 0.0), 0.05, 0)
    500
    """
    if seconds <= 0:
        return 0
    _, b_s, c_s = line
    first_s = b_s + c_s * context_tokens
    both_s = first_s + math.sqrt(first_s * first_s + 2 * c_s * seconds)
    return int(2 * seconds / both_s) if both_s > 0 else UNLIMITED_TOKENS
