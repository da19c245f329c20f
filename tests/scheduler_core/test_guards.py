"""The two guards: a share of time for who was passed over, arrival order for a policy that fails."""

import logging
from collections.abc import Callable

import pytest
from builders import decode_instance, decode_view_of, resident, waiting
from simulations import fleet, workload

from kairos.adapters.simulator.run import Knobs, Run, simulate
from kairos.scheduler_core.errors import PolicyError
from kairos.scheduler_core.guards import ShareGuard, ValidityGuard, check_decode_plan, check_order
from kairos.scheduler_core.policy import DecodePlan
from kairos.scheduler_core.strategy import parse_strategy

# -- the share guard ---------------------------------------------------------------------------------------------------


def test_the_bucket_fills_at_the_share_of_busy_time_while_someone_waits_for_its_due() -> None:
    guard = ShareGuard(0.05)
    guard.fill(10.0, waiting("owed", 3.0))
    guard.fill(10.0, None)

    assert guard.bucket_s == pytest.approx(0.5)


def test_the_bucket_holds_at_most_the_work_of_the_oldest() -> None:
    guard = ShareGuard(0.05)
    guard.fill(1_000.0, waiting("owed", 3.0))

    assert guard.bucket_s == 3.0


def test_the_oldest_runs_next_once_the_bucket_covers_it_and_pays_for_it() -> None:
    guard, owed = ShareGuard(0.05), waiting("owed", 3.0)
    guard.fill(59.0, owed)
    covered = [guard.covers(owed)]
    guard.fill(1.0, owed)
    covered.append(guard.covers(owed))
    guard.give_floor(owed)

    assert covered == [False, True]
    assert guard.bucket_s == pytest.approx(0.0)
    assert guard.pinned == "owed"


def test_who_was_given_the_floor_keeps_it_until_it_is_released() -> None:
    guard, owed = ShareGuard(0.5), waiting("owed", 1.0)
    guard.fill(2.0, owed)
    guard.give_floor(owed)

    guard.release("another")
    kept = guard.pinned
    guard.release("owed")

    assert (kept, guard.pinned) == ("owed", None)


def test_nobody_is_given_the_floor_when_nobody_is_owed_or_the_share_is_zero() -> None:
    full = ShareGuard(0.05)
    full.fill(1_000.0, waiting("owed", 3.0))
    off = ShareGuard(0.0)
    off.fill(1_000.0, waiting("owed", 3.0))

    assert not full.covers(None)
    assert not off.covers(waiting("owed", 3.0))
    assert off.bucket_s == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="use 0 \\(off\\) up to below 1"):
        ShareGuard(share)


# 100 short prompts a 100 s, each as long as the time between them, and ten long ones at the start: `sjf` never runs a
# long one while there is a short one
SHORT, LONG = 1_000, 4_000
OVERLOAD = workload([0.0] * 10 + [float(n) for n in range(400)], [LONG] * 10 + [SHORT] * 400, ttft_target_s=50.0)


def overload(share: float, prefill: str = "sjf") -> Run:
    strategy = parse_strategy(f"{prefill}+late+headroom+continuous")
    return simulate(OVERLOAD, fleet(), strategy, Knobs(deferred_share=share, stages="prefill"))


def seconds_of_the_long_ones(run: Run, until_s: float) -> float:
    return sum(
        step.end_s - step.start_s
        for step in run.steps
        if step.start_s < until_s and any(n < 10 for n in step.request_ids)
    )


def test_without_the_guard_the_long_ones_wait_until_the_overload_is_over() -> None:
    assert seconds_of_the_long_ones(overload(0.0), until_s=400.0) == 0.0


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_the_passed_over_ones_get_about_their_share_of_busy_time(share: float) -> None:
    given_s = seconds_of_the_long_ones(overload(share), until_s=400.0)

    # a whole prompt is given at a time, so the last one may still be owed
    assert share * 400.0 - LONG / 1_000 <= given_s <= share * 400.0


@pytest.mark.parametrize("prefill", ["sjf", "on-time", "least-laxity(lost_last=true)", "urgency", "short-first"])
def test_everyone_is_served_in_the_end_and_the_starved_ones_one_after_another(prefill: str) -> None:
    run = overload(0.05, prefill)
    first_token_s = run.requests.first_token_s

    assert not [n for n in range(410) if not first_token_s[n] > 0]
    assert first_token_s[:10].tolist() == sorted(first_token_s[:10].tolist())


def test_the_share_bounds_how_long_the_oldest_waits() -> None:
    # 4 s of work at 5 % of busy time: 80 s each, one after another
    first_token_s = overload(0.05).requests.first_token_s

    assert [float(first_token_s[n]) for n in range(4)] == pytest.approx([80 + 4, 160 + 8, 240 + 12, 320 + 16], abs=12)


# -- the validity guard ------------------------------------------------------------------------------------------------


def known(*ids: object) -> Callable[[object], bool]:
    return set(ids).__contains__


@pytest.mark.parametrize(
    ("order", "needed", "says"),
    [
        ([1], 2, "ordered 1 requests where 2 were wanted"),
        ([], 1, "ordered 0 requests where 1 were wanted"),
        ([1, 1], 2, "named a request twice"),
        ([1, 7], 2, "named request 7, which does not wait here"),
        ([float("nan")], 1, "named request nan, which does not wait here"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_refused(order: list[int], needed: int, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        check_order(order, needed, known(1, 2, 3))


def test_what_comes_after_the_wanted_ones_of_an_order_does_not_matter() -> None:
    check_order([1, 2, 2, 9], 2, known(1, 2, 3))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (DecodePlan(["x"]), "admits 'x', which is not ready here"),
        (DecodePlan(["r"]), "admits 'r', which is not ready here"),
        (DecodePlan(["a", "a"]), "admits 'a', which is not ready here"),
        (DecodePlan(["a", "b"]), "admits 'b' past the KV capacity of 4000 tokens"),
        (DecodePlan(swap_out=["a"]), "swaps out 'a', which is not resident"),
        (DecodePlan(swap_out=["r"], admit=["a", "b", "c"]), "holds 3 requests where the engine holds 2"),
        (DecodePlan(step=["r", "r"]), "take part twice"),
        (DecodePlan(step=["a"]), "take part twice, or one that is not resident"),
        (DecodePlan(step=[]), "lets nobody take part"),
        (DecodePlan(swap_out=["r"], admit=["a"], step=["r"]), "not resident"),
    ],
)
def test_a_decode_plan_that_cannot_be_carried_out_is_refused(plan: DecodePlan, says: str) -> None:
    small = decode_instance(kv_tokens=4_000, batch_limit=2)
    ready = [resident("a", 1_000), resident("b", 2_000), resident("c", 10)]
    view = decode_view_of(0.0, [resident("r", 1_000)], ready, small)

    with pytest.raises(PolicyError, match=says):
        check_decode_plan(plan, view)


def test_a_swapped_out_resident_makes_room_and_may_come_back_in_the_same_plan() -> None:
    view = decode_view_of(0.0, [resident("r", 3_000)], [resident("a", 3_000)], decode_instance(kv_tokens=4_000))

    check_decode_plan(DecodePlan(admit=["a"], swap_out=["r"]), view)
    check_decode_plan(DecodePlan(admit=["r"], swap_out=["r"], step=["r"]), view)


class Clock:
    """A timer that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_decision_past_its_budget_is_refused_with_both_times() -> None:
    clock = Clock()
    guard = ValidityGuard(budget_s=0.001, timer=clock)
    started_s = guard.start()
    clock.now_s += 0.001
    guard.check_budget(started_s)
    clock.now_s += 0.0025

    with pytest.raises(PolicyError, match=r"took 3\.5 ms of a budget of 1\.0 ms"):
        guard.check_budget(started_s)


def test_without_a_budget_no_decision_is_too_slow() -> None:
    clock = Clock()
    guard = ValidityGuard(timer=clock)
    started_s = guard.start()
    clock.now_s += 1e6

    guard.check_budget(started_s)


class Failing:
    """A policy, by name."""


class AlsoFailing:
    """Another one."""


def test_failures_are_counted_by_policy_and_error_and_logged_at_most_once_a_minute_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    guard = ValidityGuard(timer=clock)
    with caplog.at_level(logging.WARNING):
        for now_s in (0.0, 1.0, 59.9, 60.0):
            clock.now_s = now_s
            guard.note(Failing(), KeyError("x"))
        guard.note(AlsoFailing(), ValueError("y"))

    assert guard.fallbacks == {"Failing: KeyError": 4, "AlsoFailing: ValueError": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "policy Failing failed, arrival order instead: KeyError",
        "policy Failing failed, arrival order instead: KeyError",
        "policy AlsoFailing failed, arrival order instead: ValueError",
    ]
