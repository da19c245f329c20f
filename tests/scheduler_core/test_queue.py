"""The queue against a plain list that is sorted anew each time."""

import pytest
from builders import waiting
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kairos.scheduler_core.domain import Waiting
from kairos.scheduler_core.queue import WaitingQueue, arrival_key, deadline_key, merged
from kairos.scheduler_core.slo import is_lost

seconds = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0, 1.1, 2.0])
"""Numbers whose sums round, so that `now + work` meets a deadline exactly, or just not."""


class QueueAgainstAList(RuleBasedStateMachine):
    """Requests come, change, leave and turn lost, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.now_s = 0.0
        self.here: dict[int, Waiting] = {}
        self.lost: set[int] = set()
        self.latest_started: tuple[float, int | str] | None = None
        self.next_id = 0

    def note(self, request: Waiting) -> None:
        assert isinstance(request.request_id, int)
        self.here[request.request_id] = request
        self.lost.discard(request.request_id)
        if is_lost(self.now_s, request.prefill_s, request.deadline_s):
            self.lost.add(request.request_id)

    @rule(age_s=seconds, work_s=seconds, target_s=seconds)
    def arrives(self, age_s: float, work_s: float, target_s: float) -> None:
        request = waiting(self.next_id, work_s, arrival_s=round(self.now_s - age_s, 2), ttft_target_s=target_s)
        self.next_id += 1
        self.queue.add(request, self.now_s)
        self.note(request)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.here)))

        assert self.queue.remove(request_id) is self.here.pop(request_id)
        self.lost.discard(request_id)

    @precondition(lambda self: self.here)
    @rule(data=st.data(), work_s=seconds)
    def is_replaced(self, data: st.DataObject, work_s: float) -> None:
        old = self.here[data.draw(st.sampled_from(sorted(self.here)))]
        fresh = waiting(
            old.request_id, work_s, arrival_s=old.arrival_s, ttft_target_s=old.ttft_target_s, prefilled_tokens=100
        )
        self.queue.replace(fresh, self.now_s)
        self.note(fresh)

    @rule(passed_s=seconds)
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.queue.settle(self.now_s)
        self.lost |= {n for n, w in self.here.items() if is_lost(self.now_s, w.prefill_s, w.deadline_s)}

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def starts(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.here)))
        request = self.queue.remove(request_id)
        self.queue.note_started(request)
        del self.here[request_id]
        self.lost.discard(request_id)
        self.latest_started = max(self.latest_started or (-1e9, 0), arrival_key(request))

    @invariant()
    def every_list_is_what_sorting_anew_gives(self) -> None:
        everyone = sorted(self.here.values(), key=arrival_key)
        live = [w for w in everyone if w.request_id not in self.lost]

        assert self.queue.by_arrival == everyone
        assert self.queue.live == live
        assert self.queue.by_deadline == sorted(live, key=deadline_key)
        assert self.queue.lost == [w for w in everyone if w.request_id in self.lost]
        assert len(self.queue) == len(everyone)
        assert all(self.queue.get(n) is w and n in self.queue for n, w in self.here.items())
        assert self.next_id not in self.queue

    @invariant()
    def the_oldest_owed_is_the_oldest_that_is_lost_or_was_passed_over(self) -> None:
        owed = [
            w
            for w in self.here.values()
            if w.request_id in self.lost or (self.latest_started and arrival_key(w) < self.latest_started)
        ]

        assert self.queue.oldest_owed() is min(owed, key=arrival_key, default=None)


TestQueueAgainstAList = QueueAgainstAList.TestCase
TestQueueAgainstAList.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize(
    ("arrival_s", "target_s", "work_s", "now_s", "lost"),
    [
        (0.1, 2.8, 0.7, 2.2, True),  # 2.2 + 0.7 > 2.9, and yet 2.9 - 0.7 >= 2.2
        (0.1, 0.4, 0.4, 0.1, False),  # 0.1 + 0.4 <= 0.5, and yet 0.5 - 0.4 < 0.1
    ],
)
def test_who_is_lost_is_told_by_the_sum_however_the_latest_start_rounds(
    arrival_s: float, target_s: float, work_s: float, now_s: float, lost: bool
) -> None:
    queue = WaitingQueue([waiting(0, work_s, arrival_s=arrival_s, ttft_target_s=target_s)], arrival_s)
    queue.settle(now_s)

    assert (len(queue.lost), len(queue.live)) == ((1, 0) if lost else (0, 1))


def test_merging_two_sorted_lists_leaves_both_as_they_were() -> None:
    first, second = [waiting(n, arrival_s=n) for n in (1, 3, 5)], [waiting(n, arrival_s=n) for n in (0, 4, 9)]

    both = merged(first, second, arrival_key)

    assert [w.arrival_s for w in both] == [0, 1, 3, 4, 5, 9]
    assert [len(first), len(second)] == [3, 3]


def test_requests_that_left_leave_nothing_behind() -> None:
    """A live queue runs for months; one without a target never turns lost."""
    queue = WaitingQueue()
    for number in range(10_000):
        queue.add(waiting(number, ttft_target_s=float("inf")), now_s=0.0)
        queue.remove(number)

    assert len(queue._latest_starts) < 1_000
