"""What is predicted for every waiting request: which instance runs it, in which place, and when its prompt is done."""

import heapq
from collections.abc import Iterator, Sequence

from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.decision import explain
from kairos.scheduler_core.domain import RequestId, Waiting
from kairos.scheduler_core.queue import arrival_key
from kairos.scheduler_core.service.prefill import Desk, Pool, PrefillStage, Start
from kairos.scheduler_core.service.schemas import PrefillAnswer, PrefillReason
from kairos.scheduler_core.slo import NO_TARGET_S, is_lost

_ORDERED_APART = 500_000
"""Up to so many instances x waiting requests each instance is asked for its own order; above, one of each group."""


class _Line:
    """What one instance will run: the policy's order, for the moment that it is free.

    Under `lost_last` a request that is lost when its turn comes steps back behind all others, oldest first.
    """

    def __init__(self, desk: Desk, order: Sequence[Waiting]) -> None:
        self.desk = desk
        self.free_at_s = desk.free_at_s
        self.placed = 0
        """Waiting requests given a place."""
        self.ahead = 0
        """Requests that run before the next one, begun ones included."""
        self._order = iter(order)
        self._lost: Iterator[Waiting] | None = None
        self._stepped_back: list[Waiting] = []

    def next(self, taken: set[RequestId]) -> Waiting | None:
        """Whom it runs next; None when nobody is left."""
        if self._lost is None:
            relegates = self.desk.lane.rule.lost_last
            for w in self._order:
                if w.request_id in taken:
                    continue
                if not (relegates and is_lost(self.free_at_s, w.prefill_s, w.deadline_s)):
                    return w
                self._stepped_back.append(w)
            self._lost = iter(sorted(self._stepped_back, key=arrival_key))
        return next((w for w in self._lost if w.request_id not in taken), None)


def plan(stage: PrefillStage, starts: Sequence[Start], running: set[RequestId]) -> list[PrefillAnswer]:
    """An answer for every waiting request, in the order in which they are predicted to start.

    Each runs alone, for as long as predicted, and arrivals to come are not known: a prediction, no promise.

    Args:
        starts: what idle instances begin now.
        running: in the step in flight of a busy instance; it needs no answer.
    """
    answers: list[PrefillAnswer] = []
    begun: dict[RequestId, Start] = {start.request.request_id: start for start in starts}
    for pool in stage.pools:
        answers.extend(_plan_pool(pool, stage.decider, stage.now_s, begun, running))
    return answers


def _plan_pool(
    pool: Pool, decider: Decider, now_s: float, begun: dict[RequestId, Start], running: set[RequestId]
) -> Iterator[PrefillAnswer]:
    lines = {line.desk.index: line for line in _lines(pool, decider, now_s)}
    places: dict[RequestId, int] = {}
    for start in begun.values():
        line = lines.get(start.desk.index)
        if line is None:
            continue
        places[start.request.request_id] = line.placed
        if start.request.remaining_tokens == start.part.new_tokens:
            yield _answer(line, start.request, now_s, now_s, line.free_at_s, line.placed, start)
            line.ahead += 1
        line.placed += 1
    free = [(line.free_at_s, index) for index, line in lines.items()]
    heapq.heapify(free)
    taken: set[RequestId] = set()
    while free:
        free_at_s, index = heapq.heappop(free)
        line = lines[index]
        w = line.next(taken)
        if w is None:
            continue
        taken.add(w.request_id)
        line.free_at_s = free_at_s + w.prefill_s
        if w.request_id in places:
            start = begun[w.request_id]
            yield _answer(line, start.request, now_s, now_s, line.free_at_s, places[w.request_id], start)
        elif w.request_id not in running:
            yield _answer(line, w, now_s, free_at_s, line.free_at_s, line.placed, None)
            line.placed += 1
        line.ahead += 1
        heapq.heappush(free, (line.free_at_s, index))


def _lines(pool: Pool, decider: Decider, now_s: float) -> Iterator[_Line]:
    """A line for every instance; those free first are asked first, since a queue is told of lost requests only once."""
    waiting = pool.waiting_requests()
    apart = waiting * len(pool.desks) <= _ORDERED_APART
    shared_orders: dict[object, list[Waiting]] = {}
    for desk in sorted(pool.desks, key=lambda desk: desk.free_at_s):
        key: object = desk.index if apart or len(desk.lane.own) else desk.group
        if key not in shared_orders:
            at_s = max(now_s, desk.free_at_s)
            shared_orders[key] = decider.prefill_order(desk.lane, at_s, pool.peers(desk, now_s))
        yield _Line(desk, shared_orders[key])


def _answer(
    line: _Line, w: Waiting, now_s: float, start_s: float, end_s: float, place: int, start: Start | None
) -> PrefillAnswer:
    why = explain(w, now_s, line.ahead, start_s - now_s, runs_next=start is not None)
    deadline_s = None if w.deadline_s == NO_TARGET_S else w.deadline_s
    return PrefillAnswer(
        w.request_id,
        line.desk.instance.instance_id,
        place,
        0 if start is None else start.part.new_tokens,
        w.prefill_s,
        end_s - w.arrival_s,
        deadline_s,
        end_s <= w.deadline_s,
        PrefillReason(
            why.code,
            None if start is None else start.reason,
            why.waited_s,
            None if deadline_s is None else why.laxity_s,
            why.ahead_requests,
            why.ahead_s,
        ),
    )
