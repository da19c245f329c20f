"""Every verdict word, reached by pairs made by hand; guards and checks by their numbers."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from service.experiments.made_experiments import drawn_pairs, pair, pairs, plan

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.experiments.design import Limits, Pair, Side, Stage, coin
from kairos.scheduler_core.service.experiments.verdict import (
    BlockHealth,
    Breach,
    Ending,
    absolute_breaches,
    judge,
    load_strata,
)

QUIET = (0.3,)


def long_prompts(champion: int, challenger: int) -> Callable[[str], dict[str, tuple[int, int]]]:
    """Late long prompts of 200, by arm."""
    return lambda arm: {"late long prompts": (challenger if arm == "B" else champion, 200)}


GUARDED = plan(guards={"late long prompts": 0.05})


# --- words -----------------------------------------------------------------------------------------------------------


def test_running_says_how_far_and_how_long_to_go() -> None:
    of = plan()
    found = judge(of, pairs(of, 5, gain=20))

    assert (found.verdict, found.stops) == ("running", False)
    assert found.sentence.startswith("No verdict yet: so far +2.0 points (")
    # n80 at 2 points and sigma .05: 13.236 * (1 + 6.25) = 96 pairs, 91 to go at 600 s
    assert found.sentence.endswith("; about 15 h more to see 2 points.")


def test_before_the_first_pair_nothing_is_known() -> None:
    found = judge(plan(), [])

    assert found.verdict == "running"
    assert (found.difference_pp.low, found.difference_pp.high) == (-100.0, 100.0)


def test_better_needs_every_load_stratum() -> None:
    of = plan()
    quiet, everywhere = judge(of, pairs(of, 40, gain=100, loads=QUIET)), judge(of, pairs(of, 40, gain=100))

    assert (quiet.verdict, quiet.stops) == ("better-so-far", False)
    assert "too few pairs at load 50-75 %, load 75-90 %, load 90-100 %" in quiet.sentence
    assert (everywhere.verdict, everywhere.stops) == ("better", True)
    assert everywhere.sentence.startswith("B met the targets more often: +10.0 points (+")


def test_better_needs_20_pairs_and_the_boundary_8() -> None:
    of = plan(sigma=0.02)
    words = [judge(of, pairs(of, n, gain=100)).verdict for n in (7, 8, 19, 20)]

    assert words == ["running", "better-so-far", "better-so-far", "better"]


def test_a_stratum_that_points_down_makes_a_gain_mixed() -> None:
    of = plan()
    busy_loses = [pair(of, i, 800, 740 if i % 4 == 3 else 950, load=(0.3, 0.6, 0.8, 0.95)[i % 4]) for i in range(40)]
    found = judge(of, busy_loses)

    assert (found.verdict, found.stops) == ("mixed", False)
    assert "worse for at load 90-100 %" in found.sentence


def test_a_guard_that_breaks_under_a_gain_makes_it_mixed_and_stops() -> None:
    found = judge(GUARDED, pairs(GUARDED, 40, gain=100, shares=long_prompts(10, 40)))

    assert (found.verdict, found.stops) == ("mixed", True)
    assert found.sentence.endswith("worse for late long prompts: your call.")


def test_a_statistical_guard_names_itself_and_both_numbers() -> None:
    found = judge(GUARDED, pairs(GUARDED, 40, gain=0, shares=long_prompts(10, 40)))

    assert (found.verdict, found.stops) == ("stopped-by-guard", True)
    assert "late long prompts 0.2 against the champion's 0.05" in found.sentence
    assert found.guards[0].needs == pytest.approx(np.log(100.0))


def test_a_guard_that_improves_does_not_act() -> None:
    found = judge(GUARDED, pairs(GUARDED, 40, gain=0, shares=long_prompts(40, 10)))

    assert not found.guards[0].breached


def test_harm_stops_the_experiment() -> None:
    of = plan()
    found = judge(of, pairs(of, 12, gain=-100, loads=QUIET))

    assert (found.verdict, found.stops) == ("worse", True)
    assert "B does harm, -10.0 points (-" in found.sentence


def test_harm_needs_8_pairs() -> None:
    # 7 pairs can reach 7 ln 2 = 4.9, more than the 3.9 that harm needs
    of = plan(sigma=0.01)
    found = [judge(of, pairs(of, n, gain=-100)) for n in (7, 8)]

    assert found[0].evidence.log_e_harm > found[0].evidence.harm_needs
    assert [f.verdict for f in found] == ["running", "worse"]


def test_an_absolute_guard_stops_at_once_and_names_both_numbers() -> None:
    found = judge(plan(), [], Ending("guard", Breach("error rate", 0.08, 0.02)))

    assert (found.verdict, found.stops) == ("stopped-by-guard", True)
    assert found.sentence == "Stopped by a guard: error rate 0.08, allowed 0.02. The champion is back."


def test_a_tight_interval_around_0_is_no_difference() -> None:
    of = plan(sigma=0.014)
    found = judge(of, pairs(of, 160, gain=0))

    assert (found.verdict, found.stops) == ("no-difference", True)
    assert found.sentence == "Any difference is smaller than 1 point."


def test_an_interval_that_passes_the_margin_on_one_side_only_is_no_verdict() -> None:
    of = plan(sigma=0.03)
    found = judge(of, pairs(of, 40, gain=-6))

    assert found.difference_pp.low < -1.0 < found.difference_pp.high < 1.0
    assert found.verdict == "running"


def test_statistical_guards_share_their_part_of_the_error_budget() -> None:
    of = plan(guards={"late long prompts": 0.05, "error rate": 0.01})

    assert [guard.needs for guard in judge(of, []).guards] == pytest.approx([np.log(200.0)] * 2)


def test_the_end_of_time_leaves_undecided_with_the_size_it_excludes() -> None:
    of = plan()
    found = judge(of, pairs(of, 30, gain=0), Ending("time"))

    assert (found.verdict, found.stops) == ("undecided", True)
    largest = max(-found.difference_pp.low, found.difference_pp.high)
    assert found.sentence == f"Not enough evidence in 20 h; smaller than about {largest:.0f} points, if anything."


def test_a_user_may_stop_and_the_interval_stays_valid() -> None:
    of = plan()
    running = judge(of, pairs(of, 10, gain=20))
    stopped = judge(of, pairs(of, 10, gain=20), Ending("user"))

    assert (stopped.verdict, stopped.stops) == ("stopped-by-user", True)
    assert stopped.difference_pp == running.difference_pp


def biased_coins() -> list[Pair]:
    heads = [i for i in range(200) if coin(plan(), i) > 0]
    return [pair(plan(), i) for i in heads[:16]]


def void_pairs() -> list[Pair]:
    return [
        pair(plan(), i, decisions=lambda _: 100, wrong_arm=lambda _, i=i: 2 if i in (3, 9) else 0) for i in range(20)
    ]


def reacting_clients() -> list[Pair]:
    def side(i: int, first: bool) -> Side:
        counted = 1200 if first == (coin(plan(), i) > 0) else 800
        return Side(counted=counted, met=counted // 2)

    return [Pair(i=i, first=side(i, True), second=side(i, False), load=0.3, share=0.5) for i in range(20)]


@pytest.mark.parametrize(
    ("observed", "says"),
    [
        (pairs(plan(), 20, gain=100, contaminated=lambda _: 310), "31% of requests waited for the other"),
        (void_pairs(), "2 of 20 pairs ran the wrong strategy"),
        (biased_coins(), "the coins do not look fair"),
        (reacting_clients(), "arrivals depend on the arm"),
    ],
    ids=["contamination", "void pairs", "coins", "counts"],
)
def test_what_is_not_valid_is_not_measurable_and_says_why(observed: list[Pair], says: str) -> None:
    found = judge(plan(), observed)

    assert (found.verdict, found.stops) == ("not-measurable", True)
    assert says in found.sentence


# --- designs ---------------------------------------------------------------------------------------------------------


def sessions(n: int) -> dict[str, Any]:
    """n sessions an arm, each of equally many of 1,000 requests."""
    return {"sessions": lambda _: n, "squares": lambda _: 1000**2 // n}


def test_sticky_arms_on_their_own_instances_can_be_better() -> None:
    of = plan("sticky")

    assert judge(of, pairs(of, 60, gain=100, **sessions(50))).verdict == "better"


def test_sticky_arms_on_one_queue_are_never_better_but_can_be_worse() -> None:
    of = plan("sticky", shared_queue=True)
    gains, loses = (
        judge(of, pairs(of, 60, gain=100, **sessions(50))),
        judge(of, pairs(of, 60, gain=-100, **sessions(50))),
    )

    assert gains.verdict == "running"
    assert "share one queue" in gains.sentence
    assert loses.verdict == "worse"


def test_a_few_big_sessions_are_not_enough_for_better() -> None:
    # a single session a block: 25 effective keys an arm in 25 blocks
    of = plan("sticky", sigma=0.02)
    few = judge(of, pairs(of, 25, gain=100, **sessions(1)))

    assert few.verdict == "better-so-far"
    assert "too few pairs or sessions" in few.sentence


def test_the_difference_between_sticky_sessions_by_hand() -> None:
    # 100 of 400 requests are B's: 90 met, A's 240 of 300; pooled 330/400 = .825; (90 - 82.5) / (400 * .1875) = 0.1
    observed = Pair(i=0, first=Side(counted=100, met=90), second=Side(counted=300, met=240), load=0.3, share=0.25)

    assert judge(plan("sticky"), [observed]).pairs[0].d == pytest.approx(0.1)


def test_uneven_session_counts_are_found() -> None:
    of = plan("sticky")
    uneven: dict[str, Any] = {"sessions": lambda arm: 120 if arm == "B" else 80, "squares": lambda _: 10_000}

    assert "coins do not look fair" in judge(of, pairs(of, 10, gain=0, **uneven)).sentence


def test_pools_speak_of_a_half_size_pool() -> None:
    of = plan("pools")

    assert judge(of, pairs(of, 40, gain=100)).sentence.endswith("in a half-size pool.")


def test_several_challengers_share_the_error_budget() -> None:
    alpha = plan().alpha.shared_by(4)

    assert judge(plan(alpha=alpha), []).evidence.better_needs == pytest.approx(np.log(200.0))


# --- the sequence ----------------------------------------------------------------------------------------------------


def test_a_pair_weighs_by_its_requests_but_at_most_3() -> None:
    of = plan()
    observed = [pair(of, 0, 400, 400, counted=500), pair(of, 1, 9000, 9000, counted=9999)]

    assert [p.w for p in judge(of, observed).pairs] == [0.5, 3.0]


def test_a_void_pair_leaves_figures_and_evidence_as_they_were() -> None:
    of = plan()
    clean = pairs(of, 20, gain=50)
    broken = pair(of, 20, 0, 1000, decisions=lambda _: 100, wrong_arm=lambda _: 50)
    found = judge(of, [*clean, broken])

    assert found.pairs[20].void
    assert (found.n.pairs, found.n.void) == (20, 1)
    assert found.evidence == judge(of, clean).evidence
    assert found.pairs[20].log_e_better == found.evidence.log_e_better


def test_a_block_without_requests_says_nothing() -> None:
    of = plan()
    empty = Pair(i=20, first=Side(counted=0, met=0), second=Side(counted=9, met=0), load=0.1, share=0.5)

    assert (
        judge(of, [*pairs(of, 20, gain=50), empty]).difference_pp.mean
        == judge(of, pairs(of, 20, 50)).difference_pp.mean
    )


def test_evidence_goes_on_after_a_restart_as_if_there_had_been_none() -> None:
    of = plan()
    observed = drawn_pairs(of, 30, gain=0.03, seed=1)
    whole = judge(of, observed)

    for n in (1, 9, 22):
        assert judge(of, observed[:n]).evidence.log_e_better == pytest.approx(whole.pairs[n - 1].log_e_better, abs=1e-9)


def test_swapping_the_arms_mirrors_every_figure() -> None:
    of = plan(guards={"error rate": 0.01}, groups={"class chat": 0.08})
    observed = drawn_pairs(of, 30, gain=0.03, seed=2)
    swapped = [msgspec.structs.replace(p, first=p.second, second=p.first) for p in observed]
    one, other = judge(of, observed), judge(of, swapped)

    for here, there in (
        (one.difference_pp, other.difference_pp),
        (one.by_group[0].difference_pp, other.by_group[0].difference_pp),
    ):
        assert (there.mean, there.low, there.high) == pytest.approx((-here.mean, -here.high, -here.low), abs=1e-6)
    assert [p.d for p in other.pairs] == pytest.approx([-p.d for p in one.pairs])
    assert other.n.champion_requests == one.n.challenger_requests
    assert other.guards[0].champion == one.guards[0].challenger


def test_a_replay_that_knows_the_load_tightens_the_interval() -> None:
    of = plan()
    with_replay = drawn_pairs(of, 60, gain=0.0, seed=3)
    without = [
        msgspec.structs.replace(
            p,
            first=msgspec.structs.replace(p.first, replayed=None),
            second=msgspec.structs.replace(p.second, replayed=None),
        )
        for p in with_replay
    ]
    tight, wide = judge(of, with_replay).difference_pp, judge(of, without).difference_pp

    assert tight.high - tight.low < 0.7 * (wide.high - wide.low)


def test_pairs_out_of_order_are_refused() -> None:
    with pytest.raises(InputError, match=r"in order, each once; found \[1, 0\]"):
        judge(plan(), [pair(plan(), 1), pair(plan(), 0)])


# --- load strata -----------------------------------------------------------------------------------------------------


def test_load_strata_by_hand() -> None:
    # 0.5 belongs to 50-75; overall mean square (2 * .01 + 2 * .09) / 4 = .05, so no variance is below .0125
    d, w = np.array([0.1, -0.1, 0.3, 0.3]), np.array([1.0, 1.0, 0.5, 1.0])
    strata = load_strata(d, w, np.array([0.5, 0.6, 0.9, 2.0]), (0.5, 0.75, 0.9))

    assert [s.pairs for s in strata] == [0, 2, 0, 2]
    assert [s.mean_pp for s in strata] == pytest.approx([0.0, 0.0, 0.0, 40.0])
    assert strata[3].t == pytest.approx(0.3 / np.sqrt(0.0125 / 2))


# --- validity --------------------------------------------------------------------------------------------------------


def test_reacting_clients_are_a_flag_where_the_covariate_comes_before_the_pair() -> None:
    found = judge(plan(covariate_before_pair=True), reacting_clients())

    assert found.verdict == "running"
    assert found.validity.flags[0].startswith("arrivals depend on the arm")


def test_some_contamination_is_a_flag() -> None:
    found = judge(plan(), pairs(plan(), 20, gain=0, contaminated=lambda _: 150))

    assert found.validity.problems == ()
    assert found.validity.flags == ("15% of requests waited for the other strategy's work: the size is blurred",)


def carried_over(leftover: int, share: float = 0.5) -> list[Pair]:
    """First blocks lose `leftover` requests where they do not follow their own arm."""
    of, made = plan(), []
    rng = np.random.default_rng(4)
    for i in range(40):
        before = "A" if i == 0 or share < 0.5 or coin(of, i - 1) > 0 else "B"
        first = "B" if coin(of, i) > 0 else "A"
        met = 850 - leftover * (first != before) + int(rng.integers(-20, 20))
        second = Side(counted=1000, met=850)
        made.append(Pair(i=i, first=Side(counted=1000, met=met), second=second, load=0.3, share=share))
    return made


def test_carry_over_between_blocks_is_found() -> None:
    p = judge(plan(), carried_over(60)).validity.carry_over_p

    assert p is not None
    assert p < 0.01


def test_a_replay_shows_carry_over_more_clearly() -> None:
    rng = np.random.default_rng(5)
    blurred, replayed = [], []
    for observed in carried_over(40):
        burst = int(rng.integers(-200, 100))
        first = msgspec.structs.replace(observed.first, met=observed.first.met + burst)
        blurred.append(msgspec.structs.replace(observed, first=first))
        known = msgspec.structs.replace(first, replayed=0.85 + burst / 1000)
        replayed.append(msgspec.structs.replace(observed, first=known))
    hidden, shown = (judge(plan(), made).validity.carry_over_p for made in (blurred, replayed))

    assert shown is not None
    assert hidden is not None
    assert shown < 0.01 < hidden


def test_where_the_champion_always_goes_before_carry_over_cannot_be_told_from_the_arm() -> None:
    assert judge(plan(stages=(Stage(0.25, None),)), carried_over(60, share=0.25)).validity.carry_over_p is None


def test_without_carry_over_its_p_values_are_uniform() -> None:
    p = [
        judge(plan(seed=seed), drawn_pairs(plan(seed=seed), 40, 0.05, seed)).validity.carry_over_p for seed in range(60)
    ]

    assert 0.02 <= np.mean([value is not None and value < 0.1 for value in p]) <= 0.2


def test_the_replays_bias_is_taken_over_the_champions_blocks() -> None:
    of = plan()
    replayed = pairs(of, 10, gain=100, replayed=lambda arm: 0.81 if arm == "A" else 0.5)

    assert judge(of, replayed).validity.replay_bias_pp == pytest.approx(1.0)


# --- absolute guards -------------------------------------------------------------------------------------------------

FINE = BlockHealth(
    requests=200,
    errors=2,
    decisions=1000,
    exceptions=0,
    fallbacks=10,
    decision_p99_us=900.0,
    healthy=True,
    worst_wait_s=20.0,
    replayed_worst_wait_s=18.0,
)
LIMITS = Limits(error_rate_p999=0.01, decision_budget_us=1000.0, ttft_target_s=2.0, worst_wait_s=15.0)


def test_a_healthy_block_breaks_no_guard() -> None:
    assert absolute_breaches(FINE, LIMITS) == []


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ({"errors": 5}, Breach("error rate", 0.025, 0.02)),
        ({"exceptions": 1}, Breach("strategy exceptions", 1.0, 0.0)),
        ({"fallbacks": 11}, Breach("guard fallback share", 0.011, 0.01)),
        ({"decision_p99_us": 1001.0}, Breach("decision p99 in us", 1001.0, 1000.0)),
        ({"healthy": False}, Breach("lost health checks", 1.0, 0.0)),
        ({"worst_wait_s": 40.0}, Breach("worst wait in s", 40.0, 30.0)),
    ],
)
def test_each_absolute_guard_acts_on_its_own_number(change: dict[str, float], breach: Breach) -> None:
    assert absolute_breaches(msgspec.structs.replace(FINE, **change), LIMITS) == [breach]


@pytest.mark.parametrize(
    "change", [{"requests": 49, "errors": 40}, {"worst_wait_s": 40.0, "replayed_worst_wait_s": 20.0}]
)
def test_few_requests_and_waits_that_the_champion_shares_break_no_guard(change: dict[str, float]) -> None:
    assert absolute_breaches(msgspec.structs.replace(FINE, **change), LIMITS) == []
