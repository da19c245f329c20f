"""vLLM's waiting queue in the order of a plan."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos.adapters.vllm.queue import KairosQueue


def request(name: str, status: str = "WAITING") -> Any:
    return SimpleNamespace(request_id=name, status=SimpleNamespace(name=status))


def queue_of(names: str) -> KairosQueue:
    queue = KairosQueue(lambda request: None)
    for name in names:
        queue.add_request(request(name))
    return queue


def drained(queue: KairosQueue) -> str:
    """What vLLM would take, one after the other."""
    taken = ""
    while queue:
        shown = queue.peek_request()
        assert queue.pop_request() is shown
        taken += shown.request_id
    return taken


def test_without_a_plan_it_is_first_come_first_served() -> None:
    assert drained(queue_of("abcd")) == "abcd"


def test_those_who_enter_go_first_and_the_others_follow_as_they_came() -> None:
    queue = queue_of("abcde")

    queue.plan("db", closed=False)

    assert [r.request_id for r in queue] == list("dbace")
    assert drained(queue) == "dbace"


def test_a_closed_queue_shows_only_those_who_enter_and_counts_all() -> None:
    queue = queue_of("abcde")

    queue.plan("c", closed=True)

    assert drained(queue) == "c"
    assert not queue
    assert len(queue) == 4
    with pytest.raises(IndexError):
        queue.peek_request()


def test_a_preempted_request_goes_before_the_plan_and_is_told() -> None:
    told: list[str] = []
    queue = KairosQueue(lambda request: told.append(request.request_id))
    for name in "abc":
        queue.add_request(request(name))
    queue.prepend_request(request("p", "PREEMPTED"))

    queue.plan("c", closed=True)

    assert told == ["p"]
    assert drained(queue) == "pc"


def test_requests_that_vllm_skipped_come_back_to_the_front() -> None:
    queue = queue_of("cd")

    queue.prepend_requests([request("b"), request("a")])

    assert drained(queue) == "abcd"


def test_whoever_left_since_the_plan_is_not_shown() -> None:
    queue = queue_of("abc")
    queue.plan("ba", closed=True)

    queue.remove_requests([request("b"), request("never here")])

    assert drained(queue) == "a"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 9)),
            st.tuples(st.just("back"), st.integers(0, 9)),
            st.tuples(st.just("preempted"), st.integers(0, 9)),
            st.tuples(st.just("remove"), st.integers(0, 9)),
            st.tuples(st.just("plan"), st.lists(st.integers(0, 12), unique=True)),
            st.tuples(st.just("close"), st.lists(st.integers(0, 12), unique=True)),
            st.tuples(st.just("pop"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_no_request_is_lost_or_shown_twice(steps: list[tuple[str, Any]]) -> None:
    queue, here = KairosQueue(lambda request: None), dict[str, Any]()
    for what, value in steps:
        name = f"r{value}"
        if what in ("add", "back", "preempted") and name not in here:
            here[name] = request(name, "PREEMPTED" if what == "preempted" else "WAITING")
            (queue.add_request if what == "add" else queue.prepend_request)(here[name])
        elif what == "remove":
            queue.remove_request(here.pop(name, request(name)))
        elif what in ("plan", "close"):
            queue.plan([f"r{n}" for n in value], closed=what == "close")
        elif what == "pop" and queue:
            shown = queue.peek_request()
            assert queue.pop_request() is shown
            del here[shown.request_id]

        assert len(queue) == len(here)
        assert sorted(r.request_id for r in queue) == sorted(here)
