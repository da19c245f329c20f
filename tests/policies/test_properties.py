"""What always holds of the rules, on cases that hypothesis makes up. Whole seconds, so that sums are exact."""

from collections.abc import Sequence
from functools import cache

import pytest
from builders import decode_instance, decode_view_of, prefill_instance, prefill_view, resident, step_times, waiting
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.policies.decode.envelope import Envelope
from kairos.policies.prefill.on_time import OnTime
from kairos.scheduler_core.domain import Part, PrefillInstance, RequestId, Waiting
from kairos.scheduler_core.guards import check_decode_plan
from kairos.scheduler_core.plugins import build_policy, installed
from kairos.scheduler_core.policy import Peer
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.strategy import PolicyChoice, build_prefill

always = settings(deadline=None)  # the machine may be busy

Jobs = Sequence[tuple[int, int]]
"""(seconds of work, deadline) each, everyone there at 0 s."""

jobs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 14)), min_size=1, max_size=7)


def requests_of(jobs: Jobs) -> list[Waiting]:
    return [waiting(n, float(work), ttft_target_s=float(deadline)) for n, (work, deadline) in enumerate(jobs)]


def most_on_time(jobs: Jobs, instances: int) -> int:
    """The most jobs that any assignment to identical instances gets done in time: by trying them all."""
    by_deadline = sorted(jobs, key=lambda job: job[1])

    @cache
    def best(place: int, busy_until: tuple[int, ...]) -> int:
        if place == len(by_deadline):
            return 0
        work, deadline = by_deadline[place]
        found = best(place + 1, busy_until)
        for n, free in enumerate(busy_until):
            if free + work <= deadline:
                after = tuple(sorted((*busy_until[:n], free + work, *busy_until[n + 1 :])))
                found = max(found, 1 + best(place + 1, after))
        return found

    return best(0, (0,) * instances)


def on_time_when_run(jobs: Jobs, instances: int) -> int:
    """How many are on time when `on-time` is asked anew at every end, each request run to its end."""
    left = {w.request_id: w for w in requests_of(jobs)}
    free_at_s = [0.0] * instances
    met = 0
    while left:
        number = min(range(instances), key=lambda n: free_at_s[n])
        now_s = free_at_s[number]
        queue = WaitingQueue(left.values(), now_s)
        peers = [Peer(str(n), free_at_s[n]) for n in range(instances) if n != number]
        view = prefill_view(now_s, queue.by_arrival, wanted=1, peers=peers)
        chosen = left.pop(OnTime().plan(view).order[0])
        free_at_s[number] = now_s + chosen.prefill_s
        met += free_at_s[number] <= chosen.deadline_s
    return met


@always
@given(jobs)
def test_on_time_keeps_as_many_as_any_order_of_one_instance_could(jobs: Jobs) -> None:
    order = OnTime().plan(prefill_view(0.0, requests_of(jobs))).order

    assert in_time_when_run_in_order(jobs, order) == most_on_time(jobs, instances=1)


def in_time_when_run_in_order(jobs: Jobs, order: Sequence[RequestId]) -> int:
    end = met = 0
    for n in order:
        assert isinstance(n, int)
        end += jobs[n][0]
        met += end <= jobs[n][1]
    return met


@always
@given(jobs)
def test_on_time_asked_anew_at_every_end_of_one_instance_loses_nobody_it_kept(jobs: Jobs) -> None:
    assert on_time_when_run(jobs, instances=1) == most_on_time(jobs, instances=1)


@always
@given(jobs, st.integers(2, 3))
def test_on_time_on_several_instances_serves_as_many_as_on_one_and_no_more_than_possible(
    jobs: Jobs, instances: int
) -> None:
    assert most_on_time(jobs, 1) <= on_time_when_run(jobs, instances) <= most_on_time(jobs, instances)


# -- on-time: who shares a step ----------------------------------------------------------------------------------------

PACKING_TIMES = step_times(prefill=(0.25, 2**-10, 0.0))  # 256 tokens take 0.25 s, a step 0.25 s more: exact sums

packable = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=8)
"""(prompt tokens / 256, deadline / 0.25 s) each."""


def packing_instance() -> PrefillInstance:
    return prefill_instance(times=PACKING_TIMES, chunk_tokens=4_096, max_requests_per_step=8)


def packable_requests(sizes: Jobs) -> list[Waiting]:
    work_s = PACKING_TIMES.remaining_prefill_s
    return [
        waiting(n, work_s(256 * size, 0, 4_096), prompt_tokens=256 * size, ttft_target_s=0.25 * deadline)
        for n, (size, deadline) in enumerate(sizes)
    ]


@always
@given(packable)
def test_sharing_a_step_makes_nobody_late_who_could_be_in_time(sizes: Jobs) -> None:
    requests = packable_requests(sizes)
    view = prefill_view(0.0, requests, instance=packing_instance())

    plan = OnTime().plan(view)

    members = [requests[n] for n in plan.order[: plan.together] if isinstance(n, int)]
    seconds = PACKING_TIMES.prefill_step_s([Part(w.remaining_tokens, w.context_tokens) for w in members])
    assert len(members) == 1 or not [w for w in members if w in view.by_deadline and seconds > w.deadline_s]


@always
@given(packable)
def test_sharing_the_first_step_loses_nobody_in_the_rest_of_the_plan(sizes: Jobs) -> None:
    requests = packable_requests(sizes)
    plan = OnTime().plan(prefill_view(0.0, requests, instance=packing_instance()))

    def met(together: int) -> int:
        ordered = [requests[n] for n in plan.order if isinstance(n, int)]
        first = ordered[:together]
        now_s = PACKING_TIMES.prefill_step_s([Part(w.remaining_tokens, 0) for w in first])
        count = sum(now_s <= w.deadline_s for w in first)
        for w in ordered[together:]:
            now_s += w.prefill_s
            count += now_s <= w.deadline_s
        return count

    assert met(plan.together) >= met(1)


# -- every rule --------------------------------------------------------------------------------------------------------


@always
@pytest.mark.parametrize("name", sorted(installed("prefill")))
@given(jobs=jobs, wanted=st.integers(1, 7), now_s=st.integers(0, 8))
def test_what_is_wanted_of_an_order_is_the_beginning_of_the_whole_order(
    name: str, jobs: Jobs, wanted: int, now_s: int
) -> None:
    def first(count: int) -> Sequence[RequestId]:
        rule = build_prefill(PolicyChoice(name))
        view = prefill_view(float(now_s), requests_of(jobs), wanted=count)
        return list(rule.policy.plan(view).order if rule.packs else rule.policy.order(view))

    assert first(wanted)[: min(wanted, len(jobs))] == first(len(jobs))[:wanted]


people = st.lists(
    st.tuples(st.integers(1, 4_000), st.integers(1, 50), st.sampled_from([0.011, 0.02, 0.05, 0.2]), st.floats(-3, 1)),
    min_size=1,
    max_size=12,
)
"""(context tokens, tokens emitted, TPOT target, first token) each."""


@always
@pytest.mark.parametrize("name", sorted(installed("decode")))
@given(people=people, resident_count=st.integers(0, 11), room=st.integers(0, 4_000), limit=st.integers(0, 3))
def test_a_decode_plan_keeps_to_who_is_there_and_to_the_room_there_is(
    name: str, people: Sequence[tuple[int, int, float, float]], resident_count: int, room: int, limit: int
) -> None:
    requests = [
        resident(n, context, output_tokens=emitted, tpot_target_s=target_s, first_token_s=first_s)
        for n, (context, emitted, target_s, first_s) in enumerate(people)
    ]
    there, ready = requests[:resident_count], requests[resident_count:]
    kv_tokens = sum(r.context_tokens for r in there) + len(there) + room
    instance = decode_instance(
        times=step_times(decode=(0.01, 1e-3, 1e-6)), kv_tokens=kv_tokens, batch_limit=max(len(there) + limit, 1)
    )
    view = decode_view_of(1.0, there, ready, instance)

    plan = build_policy("decode", name, {}).step(view)

    check_decode_plan(plan, view)
    assert len(there) - len(plan.swap_out) + len(plan.admit) > 0


@always
@given(people=people)
def test_envelope_lets_no_step_outlast_the_tightest_target_that_it_keeps(
    people: Sequence[tuple[int, int, float, float]],
) -> None:
    times = step_times(decode=(0.01, 1e-3, 1e-6))
    residents = [
        resident(n, context, output_tokens=emitted, tpot_target_s=0.05, first_token_s=1.0 - 0.05 * emitted + 0.04)
        for n, (context, emitted, _, _) in enumerate(people)
    ]
    view = decode_view_of(1.0, residents, instance=decode_instance(times=times))

    step = Envelope().step(view).step
    members = residents if step is None else [r for r in residents if r.request_id in set(step)]

    seconds = times.decode_step_s(len(members), sum(r.context_tokens for r in members))
    assert len(members) == 1 or seconds <= 0.9 * 0.05
