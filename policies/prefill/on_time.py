"""The largest set of requests that can all still be on time, in deadline order: the default."""

import heapq
from collections.abc import Sequence
from itertools import chain, islice

from kairos.scheduler_core.domain import Part, RequestId, Waiting, saturation_knee_tokens
from kairos.scheduler_core.policy import Peer, PrefillPlan, PrefillView
from kairos.scheduler_core.queue import deadline_key
from kairos.scheduler_core.slo import is_lost


class OnTime:
    """Runs the largest set of requests that can all still be on time, earliest deadline first.

    1. Candidates can still be on time alone, at the median prediction. They are walked by deadline; whenever one would
       be late, the largest remaining work per weight so far is dropped (Moore-Hodgson: exact for one instance and equal
       weights). With several instances, each candidate goes to the one that would finish it first.
    2. The kept ones run in deadline order; behind them the dropped ones, shortest first, then the lost, oldest first.
    3. A further request joins a step only while no kept one's deadline suffers by it, up to the profile's saturation
       knee: past it, sharing a step saves next to nothing.

    Source: Moore 1968 (Management Science 15, 102-109); several instances and packing: docs/policies.md.
    """

    def plan(self, view: PrefillView) -> PrefillPlan:
        """Kept, dropped and lost ids in that order, and how many of the first share the step."""
        kept, dropped = _keep_among_peers(view) if view.peers else _keep_alone(view)
        dropped.sort(key=lambda w: w.prefill_s)
        ordered = chain(kept, dropped, view.lost)
        limit = view.instance.max_requests_per_step
        if limit == 1 or view.instance.chunk_tokens is None:
            return PrefillPlan([w.request_id for w in islice(ordered, view.wanted)])
        first = list(islice(ordered, max(view.wanted, limit)))
        together = _share_step(first[:limit], len(kept), view)
        return PrefillPlan([w.request_id for w in first], together)


def _keep_alone(view: PrefillView) -> tuple[Sequence[Waiting], list[Waiting]]:
    """Kept and dropped requests of an instance that has its queue to itself, each by deadline."""
    candidates = view.by_deadline
    busy_until_s = view.now_s
    for first_late, w in enumerate(candidates):  # noqa: B007  read after the loop
        ends_s = busy_until_s + w.prefill_s
        if ends_s > w.deadline_s:
            break
        busy_until_s = ends_s
    else:
        return candidates, []
    kept = [(-w.prefill_s / w.weight, -place) for place, w in enumerate(candidates[:first_late])]
    heapq.heapify(kept)
    dropped: set[int] = set()
    push, push_pop = heapq.heappush, heapq.heappushpop
    for place, w in enumerate(candidates[first_late:], start=first_late):
        work_s = w.prefill_s
        busy_until_s += work_s
        if busy_until_s <= w.deadline_s:
            push(kept, (-work_s / w.weight, -place))
        else:
            leaving = -push_pop(kept, (-work_s / w.weight, -place))[1]
            dropped.add(leaving)
            busy_until_s -= candidates[leaving].prefill_s
    stay = [w for place, w in enumerate(candidates) if place not in dropped]
    return stay, [candidates[place] for place in sorted(dropped)]


class _Plan:
    """The kept requests of one instance among several."""

    __slots__ = ("busy_until_s", "kept", "peer")

    def __init__(self, free_at_s: float, peer: Peer | None) -> None:
        self.busy_until_s = free_at_s
        self.peer = peer
        self.kept: list[tuple[float, int, float]] = []

    def work_s(self, w: Waiting) -> float:
        return w.prefill_s if self.peer is None or self.peer.prefill_s is None else self.peer.prefill_s(w)

    def keep(self, place: int, w: Waiting, work_s: float) -> int | None:
        """Keep a request; the place of the one that leaves for it when it would be late."""
        self.busy_until_s += work_s
        entry = (-work_s / w.weight, -place, work_s)
        if self.busy_until_s <= w.deadline_s:
            heapq.heappush(self.kept, entry)
            return None
        _, leaving, leaving_s = heapq.heappushpop(self.kept, entry)
        self.busy_until_s -= leaving_s
        return -leaving


def _keep_among_peers(view: PrefillView) -> tuple[list[Waiting], list[Waiting]]:
    """Kept and dropped requests when peers share the queue: kept here, then kept elsewhere, each by deadline."""
    now_s = view.now_s
    plans = [_Plan(now_s, None), *(_Plan(max(peer.free_at_s, now_s), peer) for peer in view.peers)]
    bound_to: dict[RequestId, int] = {
        w.request_id: number
        for number, peer in enumerate(view.peers, start=1)
        for w in peer.bound
        if not is_lost(now_s, w.prefill_s, w.deadline_s)
    }
    candidates = view.by_deadline
    if bound_to:
        bound = (w for peer in view.peers for w in peer.bound if w.request_id in bound_to)
        candidates = sorted(chain(candidates, bound), key=deadline_key)
    uniform = all(peer.prefill_s is None for peer in view.peers)
    soonest = [(plan.busy_until_s, number) for number, plan in enumerate(plans)]
    heapq.heapify(soonest)
    owner: list[int] = []
    dropped: set[int] = set()
    for place, w in enumerate(candidates):
        if w.request_id in bound_to:
            number = bound_to[w.request_id]
        elif w.prefilled_tokens:
            number = 0
        elif uniform:
            while soonest[0][0] != plans[soonest[0][1]].busy_until_s:
                heapq.heappop(soonest)  # it changed since
            number = soonest[0][1]
        else:
            number = min(range(len(plans)), key=lambda n: plans[n].busy_until_s + plans[n].work_s(w))
        plan = plans[number]
        owner.append(number)
        leaving = plan.keep(place, w, w.prefill_s if w.request_id in bound_to else plan.work_s(w))
        if leaving is not None:
            dropped.add(leaving)
        heapq.heappush(soonest, (plan.busy_until_s, number))
    mine = [(place, w) for place, w in enumerate(candidates) if w.request_id not in bound_to]
    here = [w for place, w in mine if not owner[place] and place not in dropped]
    elsewhere = [w for place, w in mine if owner[place] and place not in dropped]
    return here + elsewhere, [w for place, w in mine if place in dropped]


def _share_step(first: Sequence[Waiting], kept: int, view: PrefillView) -> int:
    """How many of the first requests share the step: lost ones freely, kept ones while none turns late."""
    times = view.instance.step_times
    budget = min(saturation_knee_tokens(times.prefill_line), view.instance.chunk_tokens or 0)
    members: list[Part] = []
    due_s = float("inf")
    for place, w in enumerate(first):
        budget -= w.remaining_tokens
        members.append(Part(w.remaining_tokens, w.context_tokens))
        if kept:
            due_s = min(due_s, w.deadline_s)
        late = view.now_s + times.prefill_step_s(members) > due_s
        if place and (budget < 0 or late or (kept and place >= kept)):
            return place
    return len(first)
