"""vLLM's waiting queue in the order of a plan."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kairos.scheduler_core.domain import RequestId


class KairosQueue:
    """Stands in for a vLLM `RequestQueue`: preempted requests, then those the plan lets in, then the others.

    The order is fixed by `plan` before a step and holds for it, since vLLM peeks, allocates, and then pops. While it is
    closed, the others do not show: the queue is false, though its length counts them; vLLM would sleep otherwise.
    Without a plan it is first come, first served.

    Args:
        on_preempted: told of every request that comes back without its KV.
    """

    def __init__(self, on_preempted: Callable[[Any], None]) -> None:
        self._on_preempted = on_preempted
        self._preempted: deque[Any] = deque()
        self._others: dict[RequestId, Any] = {}
        """Everything else, in arrival order."""
        self._enter: deque[RequestId] = deque()
        """The first of them, in the order of the plan."""
        self._closed = False

    def plan(self, enter: Iterable[RequestId], closed: bool) -> None:
        """Set the order of the next step; ids that do not wait here are left out."""
        self._enter = deque(request_id for request_id in enter if request_id in self._others)
        self._closed = closed

    def open(self) -> None:
        """First come, first served."""
        self._enter.clear()
        self._closed = False

    def add_request(self, request: Any) -> None:
        """At the end."""
        self._others[request.request_id] = request

    def peek_request(self) -> Any:
        """The next one; IndexError when none shows."""
        if self._preempted:
            return self._preempted[0]
        if self._enter:
            return self._others[self._enter[0]]
        if self._closed or not self._others:
            raise IndexError("peek from a queue that shows no request")
        return next(iter(self._others.values()))

    def pop_request(self) -> Any:
        """Take out what `peek_request` showed."""
        request = self.peek_request()
        if self._preempted:
            self._preempted.popleft()
        else:
            if self._enter:
                self._enter.popleft()
            del self._others[request.request_id]
        return request

    def prepend_request(self, request: Any) -> None:
        """Put a preempted request first; any other one is put back to the front of the arrivals."""
        self.prepend_requests((request,))

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """The same for several, each before the one before it."""
        back: dict[RequestId, Any] = {}
        for request in requests:
            if request.status.name == "PREEMPTED":
                self._preempted.appendleft(request)
                self._on_preempted(request)
            else:
                back = {request.request_id: request, **back}
        if back:
            self._others = {**back, **self._others}

    def remove_request(self, request: Any) -> None:
        """Take a request out."""
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take out those of the requests that are here."""
        gone = {request.request_id for request in requests}
        for request_id in gone:
            self._others.pop(request_id, None)
        if any(request.request_id in gone for request in self._preempted):
            self._preempted = deque(request for request in self._preempted if request.request_id not in gone)
        if self._enter:
            self._enter = deque(request_id for request_id in self._enter if request_id not in gone)

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of that id waits and was not preempted."""
        return request_id in self._others

    def __bool__(self) -> bool:
        return bool(self._preempted or self._enter or (self._others and not self._closed))

    def __len__(self) -> int:
        return len(self._preempted) + len(self._others)

    def __iter__(self) -> Iterator[Any]:
        yield from tuple(self._preempted)
        first = [self._others[request_id] for request_id in self._enter]
        yield from first
        entering = set(self._enter)
        yield from [request for request_id, request in self._others.items() if request_id not in entering]
