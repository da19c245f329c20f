"""Who runs what when, and which requests count."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from service.experiments.made_experiments import plan

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.experiment import Slot, read_schedule, sign
from kairos.scheduler_core.service.experiments.design import (
    RAMP_UP,
    Design,
    Lengths,
    Stage,
    closed_pairs,
    coin,
    coins,
    counted,
    drain_p90_s,
    draw_schedule,
    lengths_for,
)

HOUR_S = 3600.0
DESIGNS: tuple[Design, ...] = ("switchback", "pools", "sticky")


def test_a_block_is_five_drains_rounded_up_to_a_minute_and_at_least_300_s() -> None:
    assert lengths_for(41.0, 8.0, 30.0) == Lengths(300.0, 41.0, 8.0, 38.0, 41.0)
    assert lengths_for(197.0, 8.0, 30.0) == Lengths(1020.0, 197.0, 8.0, 38.0, 197.0)
    # 5 * 60.1 = 300.5
    assert lengths_for(60.1, 8.0, 30.0).block_s == 360.0


def test_a_queue_that_does_not_drain_within_an_hours_block_is_not_measurable_by_switchback() -> None:
    assert lengths_for(720.0, 8.0, 30.0).block_s == 3600.0
    with pytest.raises(InputError, match=r"drains in 730 s, which needs blocks of 3660 s.*use pools"):
        lengths_for(730.0, 8.0, 30.0)


def test_a_target_of_half_a_block_leaves_too_little_to_count() -> None:
    with pytest.raises(InputError, match="a TTFT target of 200 s leaves less than half of a block of 300 s"):
        lengths_for(10.0, 200.0, 30.0)


def test_the_drain_is_taken_over_late_requests() -> None:
    # at each arrival the last of those present finishes at 5, 20, 20, 101
    arrival_s, finished_s = np.array([0.0, 10.0, 12.0, 100.0]), np.array([5.0, 20.0, 15.0, 101.0])

    assert drain_p90_s(arrival_s, finished_s, np.array([False, True, False, False])) == 10.0
    assert drain_p90_s(arrival_s, finished_s, np.zeros(4, dtype=bool)) == pytest.approx(np.quantile([5, 10, 8, 1], 0.9))


def test_only_arrivals_between_burn_in_and_tail_count() -> None:
    slot = Slot(1000.0, 1300.0, "B", 0.5, 0)
    arrival_s = np.array([1000.0, 1059.9, 1060.0, 1291.9, 1292.0, 1300.0])

    assert counted(arrival_s, slot, plan().lengths).tolist() == [False, False, True, True, False, False]


def test_coins_are_the_same_after_a_restart_and_other_for_another_seed_or_experiment() -> None:
    assert coins(plan(), range(200)) == coins(plan(), range(200))
    assert coins(plan(), range(150, 200)) == coins(plan(), range(200))[150:]
    assert len({coins(plan(), range(200)), coins(plan(seed=8), range(200)), coins(plan(id="exp_02"), range(200))}) == 3


def test_coins_are_written_down_so_that_no_release_changes_a_running_experiment() -> None:
    assert coins(plan(), range(24)) == "---+-+-+---++--+--+-+++-"


def test_coins_are_fair() -> None:
    falls = np.array([coin(plan(), i) for i in range(20_000)])

    assert abs(falls.mean()) < 4 / np.sqrt(20_000)
    assert abs((falls[1:] * falls[:-1]).mean()) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_schedule_drawn_later_by_a_replica_agrees_with_the_first(design: Design) -> None:
    of = plan(design, stages=RAMP_UP, max_hours=60.0)
    first = draw_schedule(of, 3, start_s=500.0, from_s=500.0)
    later = draw_schedule(of, 3, start_s=500.0, from_s=500.0 + 10 * HOUR_S)

    shared = [slot for slot in first.slots if slot.end_s > 500.0 + 10 * HOUR_S]
    assert list(later.slots[: len(shared)]) == shared
    assert len(later.slots) > len(shared) > 10


@pytest.mark.parametrize("design", DESIGNS)
def test_a_schedule_covers_24_hours_without_a_gap_and_ends_with_the_experiment(design: Design) -> None:
    slots = draw_schedule(plan(design, stages=RAMP_UP, max_hours=60.0), 3, 0.0, 0.0).slots
    short = draw_schedule(plan(design, stages=RAMP_UP, max_hours=2.0), 3, 0.0, 0.0).slots

    assert all(earlier.end_s == later.start_s for earlier, later in pairwise(slots))
    assert slots[0].start_s == 0.0
    assert slots[-1].end_s >= 24 * HOUR_S > slots[-1].start_s
    assert short[-1].start_s < 2 * HOUR_S


@pytest.mark.parametrize("design", ["switchback", "pools"])
@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.05, 2), (0.25, 4), (0.5, 20)])
def test_each_stage_gives_the_challenger_its_share_of_time(design: Design, share: float, number: int) -> None:
    slots = draw_schedule(plan(design, stages=RAMP_UP, max_hours=60.0), 3, 0.0, 0.0).slots
    stage = [slot for slot in slots if slot.share == share]
    total_s = sum(slot.end_s - slot.start_s for slot in stage)
    challenger_s = sum((slot.end_s - slot.start_s) * slot.arms.count("B") / len(slot.arms) for slot in stage)

    assert challenger_s / total_s == pytest.approx(share, abs=0.01)
    if share == 0.01:
        assert {slot.pair for slot in stage} == {None}
    elif share < 0.5:
        assert len({slot.pair for slot in stage} - {None}) == number


def test_the_stages_of_a_switchback_last_as_long_as_documented() -> None:
    slots = draw_schedule(plan(stages=RAMP_UP, max_hours=60.0), 3, 0.0, 0.0).slots
    hours = {
        stage.share: sum(slot.end_s - slot.start_s for slot in slots if slot.share == stage.share) / HOUR_S
        for stage in RAMP_UP[:3]
    }

    assert hours == pytest.approx({0.01: 100 / 60, 0.05: 200 / 60, 0.25: 80 / 60})


def test_a_pair_runs_both_strategies_the_challenger_first_where_the_coin_says_plus() -> None:
    of = plan()
    schedule = draw_schedule(of, 3, 0.0, 0.0)

    for slots in closed_pairs(of, 0.0, 6 * HOUR_S):
        arms = "".join(slot.arms for slot in slots)
        assert arms == ("BA" if coin(of, slots[0].pair or 0) > 0 else "AB")
        assert schedule.strategy_at(slots[0].start_s + 1.0) == ("s2@1" if arms[0] == "B" else "s1@4")


def test_two_pools_run_one_strategy_each() -> None:
    schedule = draw_schedule(plan("pools"), 3, 0.0, 0.0)

    for now_s in np.arange(10.0, 6 * HOUR_S, 300.0):
        assert {schedule.strategy_at(now_s, 0), schedule.strategy_at(now_s, 1)} == {"s1@4", "s2@1"}


def test_outside_the_schedule_the_champion_runs() -> None:
    schedule = draw_schedule(plan(), 3, 0.0, 0.0)

    assert schedule.strategy_at(-1.0) == schedule.strategy_at(48 * HOUR_S) == "s1@4"


def test_only_pairs_whose_last_request_is_known_are_closed() -> None:
    # two blocks of 300 s, then 20 s until the last request is known
    assert closed_pairs(plan(), 0.0, 619.0) == []
    assert len(closed_pairs(plan(), 0.0, 620.0)) == 1
    assert [slots[0].pair for slots in closed_pairs(plan(), 0.0, 1900.0)] == [0, 1, 2]


def sessions_of_b(share: float, now_s: float = 10.0) -> set[int]:
    schedule = draw_schedule(plan("sticky", stages=(Stage(share, None),)), 3, 0.0, 0.0)
    return {k for k in range(4000) if schedule.strategy_of(f"session-{k}", now_s) == "s2@1"}


def test_sessions_have_the_same_arm_on_every_replica_and_arms_have_their_share() -> None:
    assert sessions_of_b(0.25) == sessions_of_b(0.25, now_s=9000.0)
    assert len(sessions_of_b(0.25)) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sessions_of_b(0.25, now_s=-1.0) == set()


def test_a_larger_share_only_adds_sessions_to_the_challenger() -> None:
    assert sessions_of_b(0.05) < sessions_of_b(0.5)


def test_the_first_percent_of_sessions_is_not_judged() -> None:
    slots = draw_schedule(plan("sticky", stages=RAMP_UP, max_hours=60.0), 3, 0.0, 0.0).slots

    assert {slot.pair for slot in slots if slot.share == 0.01} == {None}
    assert [slot.pair for slot in slots if slot.share == 0.05] == [0, 1]


def test_a_signed_schedule_is_read_back_as_it_was() -> None:
    schedule = draw_schedule(plan(), 3, 0.0, 0.0)

    assert read_schedule(sign(schedule, b"key"), b"key") == schedule


@pytest.mark.parametrize(
    "tampered",
    [
        lambda signed: signed.replace(b'"generation":3', b'"generation":4'),
        lambda signed: signed.replace(b'"arms":"A"', b'"arms":"B"', 1),
        lambda signed: b"0" + signed[1:] if signed[:1] != b"0" else b"1" + signed[1:],
        lambda signed: signed.partition(b".")[2],
        lambda signed: b"",
        lambda signed: "é".encode() + signed,
    ],
)
def test_a_tampered_schedule_is_refused(tampered: Callable[[bytes], bytes]) -> None:
    signed = sign(draw_schedule(plan(), 3, 0.0, 0.0), b"key")

    with pytest.raises(InputError, match="does not carry our signature"):
        read_schedule(tampered(signed), b"key")


def test_a_schedule_signed_with_another_key_is_refused() -> None:
    with pytest.raises(InputError, match="does not carry our signature"):
        read_schedule(sign(draw_schedule(plan(), 3, 0.0, 0.0), b"key"), b"other")
