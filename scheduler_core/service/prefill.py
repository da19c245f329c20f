"""The prefill half of a snapshot: admission, placement, what idle instances run next, and the plan for the rest.

Decisions are made as the simulator makes them, by the same Decider: arrivals in order, then idle instances in index
order. The plan behind them is a prediction: every instance goes on in the order that the policy gives for the moment it
is free, each request as long as predicted, alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from kairos.scheduler_core.decider import Decider, PrefillLane
from kairos.scheduler_core.decision import PrefillDecision, Reason
from kairos.scheduler_core.domain import Part, PrefillInstance, RequestId, StepTimes, Waiting
from kairos.scheduler_core.policy import AdmissionView, Peer, PrefillLoad, PrefillPlacementView
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.service.schemas import (
    Instance,
    Rejection,
    RunningRequest,
    WaitingRequest,
)
from kairos.scheduler_core.slo import NO_TARGET_S, ttft_deadline_s

Targets = Callable[[str], tuple[float, float]]
"""TTFT and TPOT targets of an SLO class; inf without one."""

Group = tuple[str, int | None, str]
"""Instances of one group predict the same seconds: profile, chunk budget, the instance where its own cache counts."""


class Desk:
    """One prefill instance of a snapshot."""

    def __init__(self, index: int, told: Instance, step_times: StepTimes, group: Group) -> None:
        self.index = index
        self.group = group
        self.instance = PrefillInstance(
            told.instance_id, step_times, told.chunk_tokens, told.max_requests_per_step, told.control
        )
        self.lane: PrefillLane
        self.busy = bool(told.free_in_s)
        self.free_in_s = told.free_in_s
        self.free_at_s = 0.0
        """Predicted end of the step in flight."""
        self.bound: list[Waiting] = []
        self.in_step: list[tuple[RunningRequest, Part]] = []
        # running totals of what is bound to it
        self.tokens = 0
        self.work_s = 0.0
        self.step_tokens = 0

    def bind(self, request: Waiting) -> None:
        """Let a request wait here."""
        self.bound.append(request)
        self.tokens += request.remaining_tokens
        self.work_s += request.prefill_s

    def settle(self, now_s: float) -> None:
        """Work out when it is free, once all that runs is known."""
        if self.in_step:
            self.busy = True
            self.step_tokens = sum(part.new_tokens for _, part in self.in_step)
            if self.free_in_s is None:
                self.free_in_s = self.instance.step_times.prefill_step_s([part for _, part in self.in_step])
        self.free_at_s = now_s + (self.free_in_s or 0.0)

    def load(self, request: Waiting, now_s: float) -> PrefillLoad:
        """Its load, for the placement of an arriving request."""
        return PrefillLoad(
            self.instance,
            len(self.bound),
            self.tokens + self.step_tokens,
            self.work_s + self.free_at_s - now_s,
            request.prefill_s,
            request.cached_tokens,
        )


class Pool:
    """Prefill instances that serve the same models."""

    def __init__(self, serves: frozenset[str]) -> None:
        self.serves = serves
        self.desks: list[Desk] = []
        self.groups: dict[Group, Desk] = {}
        """One instance of each group."""
        self.unbound: dict[Group, list[Waiting]] = {}
        """Requests that any instance may take, as each group sees them."""
        self.shared: dict[Group, WaitingQueue] = {}

    @property
    def key(self) -> str:
        """Its name in the memory."""
        return "|".join(sorted(self.serves))

    def serves_model(self, model: str) -> bool:
        """Whether it may take a request for a model; one that names none goes anywhere."""
        return not model or model in self.serves

    def waiting_requests(self) -> int:
        """How many wait, bound or not."""
        unbound = next(iter(self.unbound.values()), ())
        return len(unbound) + sum(len(desk.bound) for desk in self.desks)

    def views(self, request: WaitingRequest, targets: Targets) -> dict[Group, Waiting]:
        """A request as each group sees it."""
        return {group: waiting_view(request, desk.instance, targets) for group, desk in self.groups.items()}

    def let_wait(self, views: Mapping[Group, Waiting]) -> None:
        """Leave a request to whichever instance is free first."""
        for group, view in views.items():
            self.unbound.setdefault(group, []).append(view)

    def peers(self, asking: Desk, now_s: float) -> Sequence[Peer]:
        """The other instances, as the asking one sees them."""
        if not self.shared:
            return ()
        return [
            Peer(
                desk.instance.instance_id,
                desk.free_at_s if desk.busy else now_s,
                desk.lane.own.by_deadline,
                None if desk.group == asking.group else self._seconds_on(desk.group),
            )
            for desk in self.desks
            if desk is not asking
        ]

    def _seconds_on(self, group: Group) -> Callable[[Waiting], float]:
        queue = self.shared[group]

        def prefill_s(w: Waiting) -> float:
            there = queue.get(w.request_id)
            return w.prefill_s if there is None else there.prefill_s

        return prefill_s

    def start(self, desk: Desk, decision: PrefillDecision, decider: Decider, now_s: float) -> None:
        """Carry out a decision: what it completes leaves, the rest waits as it will be after the step."""
        decider.prefill_started(desk.lane, decision)
        desk.busy = True
        desk.free_at_s = now_s + desk.instance.step_times.prefill_step_s(decision.parts)
        for request, part in zip(decision.requests, decision.parts, strict=True):
            if request.request_id in desk.lane.own:
                desk.lane.own.remove(request.request_id)
            else:
                for queue in self.shared.values():
                    queue.remove(request.request_id)
                    queue.note_started(request)
            if request.remaining_tokens > part.new_tokens:
                desk.lane.own.add(after_step(request, part, desk.instance), desk.free_at_s)


def waiting_view(request: WaitingRequest, instance: PrefillInstance, targets: Targets) -> Waiting:
    """A waiting request as an instance sees it."""
    prompt, arrival_s, target_s = request.prompt_tokens, request.arrival_s, request.ttft_target_s
    cached, prefilled = request.cached_tokens, request.prefilled_tokens
    if request.cached_tokens_by_instance:
        cached = request.cached_tokens_by_instance.get(instance.instance_id, cached)
    if target_s is None:
        target_s = targets(request.slo_class)[0]
    seconds, chunk = instance.step_times.remaining_prefill_s, instance.chunk_tokens
    left_s = seconds(prompt - cached - prefilled, cached + prefilled, chunk)
    return Waiting(
        request.request_id,
        arrival_s,
        prompt,
        target_s,
        ttft_deadline_s(arrival_s, target_s),
        left_s,
        seconds(prompt - cached, cached, chunk) if prefilled else left_s,
        cached,
        prefilled,
        request.slo_class,
        request.tenant,
        request.weight,
    )


def part_in_flight(request: RunningRequest, chunk_tokens: int | None) -> Part:
    """What a running request has in the step in flight."""
    context = request.cached_tokens + request.prefilled_tokens
    left = request.prompt_tokens - context
    return Part(min(request.step_tokens or left, left, chunk_tokens or left), context)


def after_step(request: Waiting, part: Part, instance: PrefillInstance) -> Waiting:
    """A request as it will be when its step has ended before its prompt is done."""
    left = request.remaining_tokens - part.new_tokens
    context = request.context_tokens + part.new_tokens
    return msgspec.structs.replace(
        request,
        prefilled_tokens=request.prefilled_tokens + part.new_tokens,
        prefill_s=instance.step_times.remaining_prefill_s(left, context, instance.chunk_tokens),
    )


class PredictedWaits:
    """How long an arriving request would wait, behind what the active policy puts before it, on its best instance.

    Everyone who waits and may still come is ordered once; those that were taken so far and stand before a request are
    its wait. For the latest arrival that is the simulator's prediction exactly; for others the order holds those that
    came after them too.
    """

    def __init__(
        self, pool: Pool, candidates: Sequence[WaitingRequest], decider: Decider, targets: Targets, now_s: float
    ) -> None:
        self._desks = pool.desks
        self._now_s = now_s
        self._places: list[dict[RequestId, int]] = []
        self._sums: list[list[float]] = []
        for desk in pool.desks:
            arriving = [waiting_view(request, desk.instance, targets) for request in candidates]
            present = [*desk.bound, *pool.unbound.get(desk.group, ())]
            lane = decider.prefill_lane(desk.instance, decider.prefill_rule())
            lane.own = WaitingQueue([*present, *arriving], now_s)
            order = decider.prefill_order(lane, now_s)
            self._places.append({w.request_id: place for place, w in enumerate(order)})
            self._sums.append([0.0] * (len(order) + 1))
            for w in present:
                self._add(len(self._sums) - 1, w)

    def ttft_s(self, views: Mapping[Group, Waiting], servers: int) -> float:
        """Predicted TTFT with the work ahead shared by so many instances."""
        best_s = NO_TARGET_S
        for number, desk in enumerate(self._desks):
            request = views[desk.group]
            place, ahead_s = self._places[number][request.request_id], 0.0
            while place:
                ahead_s += self._sums[number][place]
                place &= place - 1
            start_s = max(desk.free_at_s, self._now_s) + ahead_s / servers
            best_s = min(best_s, start_s + request.prefill_s - request.arrival_s)
        return best_s

    def take(self, views: Mapping[Group, Waiting], instance_id: str | None) -> None:
        """Count a request that was taken, on its instance or on all that share the queue."""
        for number, desk in enumerate(self._desks):
            if instance_id in (None, desk.instance.instance_id):
                self._add(number, views[desk.group])

    def _add(self, number: int, request: Waiting) -> None:
        sums = self._sums[number]
        place = self._places[number][request.request_id] + 1
        while place < len(sums):
            sums[place] += request.prefill_s
            place += place & -place


class Start(NamedTuple):
    """A request in the step that an idle instance begins now."""

    desk: Desk
    request: Waiting
    part: Part
    reason: Reason


class PrefillStage:
    """All prefill instances of a snapshot under one Decider."""

    def __init__(self, decider: Decider, targets: Targets, now_s: float) -> None:
        self.decider, self.targets, self.now_s = decider, targets, now_s
        self.pools: list[Pool] = []
        self.desks: dict[str, tuple[Pool, Desk]] = {}
        self.rejected: list[Rejection] = []
        self.shares_rule = decider.strategy.prefill_placement.name == "late"

    def add_instance(self, told: Instance, serves: frozenset[str], step_times: StepTimes, group: Group) -> None:
        """Take an instance in; they come in index order."""
        pool = next((pool for pool in self.pools if pool.serves == serves), None)
        if pool is None:
            pool = Pool(serves)
            self.pools.append(pool)
        desk = Desk(len(self.desks), told, step_times, group)
        pool.desks.append(desk)
        pool.groups.setdefault(group, desk)
        self.desks[told.instance_id] = pool, desk

    def add_running(self, running: Sequence[RunningRequest]) -> None:
        """Take in what is in a step; an unfinished prompt then waits at its instance as it will be afterwards."""
        for told in running:
            desk = self.desks[told.instance_id][1]
            part = part_in_flight(told, desk.instance.chunk_tokens)
            desk.in_step.append((told, part))
            request = waiting_view(
                WaitingRequest(
                    told.request_id,
                    told.arrival_s,
                    told.prompt_tokens,
                    told.cached_tokens,
                    {},
                    told.prefilled_tokens,
                    slo_class=told.slo_class,
                    ttft_target_s=told.ttft_target_s,
                    tenant=told.tenant,
                    weight=told.weight,
                ),
                desk.instance,
                self.targets,
            )
            if request.remaining_tokens > part.new_tokens:
                desk.bind(after_step(request, part, desk.instance))
        for _, desk in self.desks.values():
            desk.settle(self.now_s)

    def add_waiting(self, waiting: Sequence[WaitingRequest], decodes: Callable[[str], bool]) -> None:
        """Take in what waits: bound ones where they are; the others arrive one by one, admission then placement.

        Args:
            decodes: whether a model has a decode instance.
        """
        arriving: list[WaitingRequest] = []
        for request in sorted(waiting, key=lambda r: (r.arrival_s, r.request_id)):
            if request.instance_id is not None:
                desk = self.desks[request.instance_id][1]
                desk.bind(waiting_view(request, desk.instance, self.targets))
            else:
                arriving.append(request)
        waits: dict[str, PredictedWaits] = {}
        if self.decider.needs_prediction:
            for pool in self.pools:
                candidates = [r for r in arriving if pool.serves_model(r.model)]
                waits[pool.key] = PredictedWaits(pool, candidates, self.decider, self.targets, self.now_s)
        for request in arriving:
            able = [pool for pool in self.pools if pool.serves_model(request.model)]
            if not able or not decodes(request.model):
                self.rejected.append(no_instance(request.request_id, request.model))
                continue
            pool = able[0] if len(able) == 1 else min(able, key=lambda p: p.waiting_requests() / len(p.desks))
            views = pool.views(request, self.targets)
            if self.decider.accepts_all or request.admitted or self._admitted(request, pool, views, waits):
                place = self._place(pool, views)
                if waits:
                    waits[pool.key].take(views, place)

    def _admitted(
        self,
        request: WaitingRequest,
        pool: Pool,
        views: Mapping[Group, Waiting],
        waits: Mapping[str, PredictedWaits],
    ) -> bool:
        servers = len(pool.desks) if self.shares_rule else 1
        predicted_ttft_s = waits[pool.key].ttft_s(views, servers) if waits else float("nan")
        first = next(iter(views.values()))
        answer = self.decider.admit(AdmissionView(self.now_s, first, predicted_ttft_s, pool.waiting_requests()))
        if not answer.accept:
            self.rejected.append(Rejection(request.request_id, answer.status, answer.reason, answer.retry_after_s))
        return answer.accept

    def _place(self, pool: Pool, views: Mapping[Group, Waiting]) -> str | None:
        """Bind a request, or leave it to whichever instance is free first; the instance, if it was bound."""
        if len(pool.desks) == 1:
            desk = pool.desks[0]
            desk.bind(views[desk.group])
            return desk.instance.instance_id
        if self.shares_rule:
            pool.let_wait(views)
            return None
        loads = [desk.load(views[desk.group], self.now_s) for desk in pool.desks]
        place = self.decider.place_prefill(PrefillPlacementView(self.now_s, next(iter(views.values())), loads))
        if place is None:
            pool.let_wait(views)
        else:
            desk = self.desks[place][1]
            desk.bind(views[desk.group])
        return place

    def open_queues(self) -> None:
        """Turn what waits into queues, and give every instance its lane."""
        for pool in self.pools:
            pool.shared = {group: WaitingQueue(waiting, self.now_s) for group, waiting in pool.unbound.items()}
            one = self.decider.prefill_rule()
            for desk in pool.desks:
                rule = one if self.shares_rule else self.decider.prefill_rule()
                desk.lane = self.decider.prefill_lane(desk.instance, rule, pool.shared.get(desk.group))
                desk.lane.own = WaitingQueue(desk.bound, self.now_s)
                begun = [told.request_id for told, _ in reversed(desk.in_step)]
                begun += [w.request_id for w in desk.lane.own.by_arrival if w.prefilled_tokens]
                desk.lane.current = next((known for known in begun if known in desk.lane.own), None)

    def start_idle(self) -> list[Start]:
        """Let every idle instance decide, in index order; what starts."""
        starts: list[Start] = []
        for pool, desk in self.desks.values():
            if desk.busy:
                continue
            decision = self.decider.next_prefill(desk.lane, self.now_s, pool.peers(desk, self.now_s))
            if decision is not None:
                members = zip(decision.requests, decision.parts, strict=True)
                starts.extend(Start(desk, request, part, decision.reason) for request, part in members)
                pool.start(desk, decision, self.decider, self.now_s)
        return starts


def no_instance(request_id: RequestId, model: str) -> Rejection:
    """The rejection of a request that nothing in the snapshot can run."""
    return Rejection(request_id, 404 if model else 503, "no_instance_serves_model", None)
