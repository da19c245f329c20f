"""The waiting requests of one queue, kept in every order that policies ask for, so that no decision sorts them anew."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from itertools import count

from kairos.scheduler_core.domain import RequestId, Waiting
from kairos.scheduler_core.slo import is_lost

Key = tuple[float, RequestId]

_ROUNDING_S = 1e-9
"""Latest starts this near to now are tested exactly: `deadline - prefill_s` and `now + prefill_s` round differently."""

_KEPT_ENTRIES = 256
"""Entries of requests that left, beyond which the heap of latest starts is cleared of them."""


def arrival_key(waiting: Waiting) -> Key:
    """Arrival order, ties to the lowest id."""
    return waiting.arrival_s, waiting.request_id


def deadline_key(waiting: Waiting) -> Key:
    """Deadline order, ties to the lowest id."""
    return waiting.deadline_s, waiting.request_id


class WaitingQueue:
    """Requests by arrival, by deadline, and those that can no longer be on time apart.

    `by_arrival` holds all; `live` (by arrival) and `by_deadline` hold those that can still be on time, `lost` (by
    arrival) the others. A request turns lost when `settle` is called at a later time; it turns live again only when
    it is replaced by a fresh view of itself. Readers must not change the lists.
    """

    def __init__(self, waiting: Iterable[Waiting] = (), now_s: float = 0.0) -> None:
        self.by_arrival = sorted(waiting, key=arrival_key)
        self.lost = [w for w in self.by_arrival if is_lost(now_s, w.prefill_s, w.deadline_s)]
        self._lost_ids = {w.request_id for w in self.lost}
        self.live = [w for w in self.by_arrival if w.request_id not in self._lost_ids]
        self.by_deadline = sorted(self.live, key=deadline_key)
        self.latest_started: Key | None = None
        """The latest arrival that was ever started from here: who came before it and still waits was deferred."""
        self._by_id = {w.request_id: w for w in self.by_arrival}
        self._serials = count()
        """Tell apart entries of a request that came back unchanged: those that are out of date stay in the heap."""
        self._latest_starts = [(w.deadline_s - w.prefill_s, next(self._serials), w) for w in self.live]
        heapq.heapify(self._latest_starts)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_id

    def get(self, request_id: RequestId) -> Waiting | None:
        """The request of that id, if it waits here."""
        return self._by_id.get(request_id)

    def add(self, request: Waiting, now_s: float) -> None:
        """Take a request in, as live or lost as it is at `now_s`."""
        self._by_id[request.request_id] = request
        insort(self.by_arrival, request, key=arrival_key)
        if is_lost(now_s, request.prefill_s, request.deadline_s):
            self._lost_ids.add(request.request_id)
            insort(self.lost, request, key=arrival_key)
        else:
            insort(self.live, request, key=arrival_key)
            insort(self.by_deadline, request, key=deadline_key)
            latest_start_s = request.deadline_s - request.prefill_s
            heapq.heappush(self._latest_starts, (latest_start_s, next(self._serials), request))

    def remove(self, request_id: RequestId) -> Waiting:
        """Take a request out; KeyError when it is not here."""
        request = self._by_id.pop(request_id)
        _delete(self.by_arrival, request, arrival_key)
        if request_id in self._lost_ids:
            self._lost_ids.remove(request_id)
            _delete(self.lost, request, arrival_key)
        else:
            _delete(self.live, request, arrival_key)
            _delete(self.by_deadline, request, deadline_key)
        if len(self._latest_starts) > 2 * len(self._by_id) + _KEPT_ENTRIES:
            self._latest_starts = [e for e in self._latest_starts if self._by_id.get(e[2].request_id) is e[2]]
            heapq.heapify(self._latest_starts)
        return request

    def replace(self, request: Waiting, now_s: float) -> None:
        """Put a fresh view of a request (after a chunk, or with a new prediction) in place of the old one."""
        self.remove(request.request_id)
        self.add(request, now_s)

    def settle(self, now_s: float) -> None:
        """Move those that turned lost by `now_s` to the lost ones."""
        starts = self._latest_starts
        undecided: list[tuple[float, int, Waiting]] = []
        while starts and starts[0][0] < now_s + _ROUNDING_S:
            entry = heapq.heappop(starts)
            request = entry[2]
            if self._by_id.get(request.request_id) is not request or request.request_id in self._lost_ids:
                continue  # it left, was replaced, or is among the lost already
            if not is_lost(now_s, request.prefill_s, request.deadline_s):
                undecided.append(entry)
                continue
            self._lost_ids.add(request.request_id)
            _delete(self.live, request, arrival_key)
            _delete(self.by_deadline, request, deadline_key)
            insort(self.lost, request, key=arrival_key)
        for entry in undecided:
            heapq.heappush(starts, entry)

    def note_started(self, request: Waiting) -> None:
        """Remember a start: requests that came earlier and still wait were passed over by it."""
        key = arrival_key(request)
        if self.latest_started is None or key > self.latest_started:
            self.latest_started = key

    def oldest_owed(self) -> Waiting | None:
        """The oldest request that is lost or was deferred (passed over at least once by a later arrival)."""
        if not self.by_arrival:
            return None
        oldest = self.by_arrival[0]
        if self.latest_started is not None and arrival_key(oldest) < self.latest_started:
            return oldest
        return self.lost[0] if self.lost else None


def merged(first: list[Waiting], second: list[Waiting], key: Callable[[Waiting], Key]) -> list[Waiting]:
    """Both sorted lists as one sorted list; the shorter one is `second`."""
    if not second:
        return first
    both = first.copy()
    for request in second:
        insort(both, request, key=key)
    return both


def _delete(ordered: list[Waiting], request: Waiting, key: Callable[[Waiting], Key]) -> None:
    del ordered[bisect_left(ordered, key(request), key=key)]
