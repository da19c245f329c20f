"""Each decode rule on a few requests, worked out by hand; most of all where two rules must differ.

Steps take 10 ms + 1 ms a participant + 1 ms per 1,000 context tokens, targets are 50 ms, unless a test says otherwise.
"""

from collections.abc import Sequence

import pytest
from builders import NO_LIMIT, decode_instance, decode_view_of, resident, step_times

from kairos.policies.decode.capped import Capped
from kairos.policies.decode.continuous import Continuous
from kairos.policies.decode.envelope import Envelope
from kairos.policies.decode.kairos_paper import KairosPaper
from kairos.policies.decode.slack import Slack
from kairos.scheduler_core.domain import DecodeInstance, Resident
from kairos.scheduler_core.policy import DecodePlan, DecodeStep
from kairos.scheduler_core.slo import NO_TARGET_S

TIMES = step_times(decode=(0.01, 1e-3, 1e-6))


def instance(max_batch: int = 64, kv_tokens: int = NO_LIMIT, batch_limit: int = NO_LIMIT) -> DecodeInstance:
    return decode_instance(times=TIMES, max_batch=max_batch, kv_tokens=kv_tokens, batch_limit=batch_limit)


def on_time(request_id: int, context_tokens: int = 1_000, tpot_target_s: float = 0.05) -> Resident:
    """At 0 s, when the first token came: the next is due one target later."""
    return resident(request_id, context_tokens, tpot_target_s=tpot_target_s)


def overdue(
    request_id: int, context_tokens: int = 1_000, tpot_target_s: float = 0.05, since_s: float = 1e3
) -> Resident:
    """At 0 s: first token `since_s` ago and nothing since."""
    return resident(request_id, context_tokens, first_token_s=-since_s, tpot_target_s=tpot_target_s)


# -- continuous and capped ---------------------------------------------------------------------------------------------


def test_continuous_admits_in_ready_order_and_stops_at_the_first_that_does_not_fit() -> None:
    # beside 1,000 resident tokens: 1,000 + 3,000 + 2 = 4,002 fit; then 4,000 + 2,000 + 3 do not, and 10 waits behind it
    ready = [on_time(1, 3_000), on_time(2, 2_000), on_time(3, 10)]

    def admitted(kv_tokens: int) -> Sequence[object]:
        return Continuous().step(decode_view_of(0.0, [on_time(0)], ready, instance(kv_tokens=kv_tokens))).admit

    assert admitted(5_000) == [1]
    assert admitted(4_002) == [1]
    assert admitted(4_001) == []


def test_continuous_stops_at_its_cap_and_at_what_the_engine_holds() -> None:
    ready = [on_time(n) for n in range(5)]

    assert Continuous().step(decode_view_of(0.0, [], ready, instance(max_batch=3))).admit == [0, 1, 2]
    assert Continuous().step(decode_view_of(0.0, [], ready, instance(batch_limit=2))).admit == [0, 1]


def test_an_empty_instance_takes_a_request_longer_than_its_kv_room() -> None:
    view = decode_view_of(0.0, [], [on_time(0, 9_000), on_time(1)], instance(kv_tokens=5_000))

    plans = [policy.step(view).admit for policy in (Continuous(), Capped(), Slack(), KairosPaper())]

    assert plans == [[0], [0], [1], [0]]  # slack takes the shortest first


def test_capped_admits_while_the_step_stays_within_the_tightest_target_of_all() -> None:
    # contexts of 1,000: steps of 12, 14, 16, 18 ms
    def admitted(*targets_s: float) -> Sequence[object]:
        ready = [on_time(n, tpot_target_s=target_s) for n, target_s in enumerate(targets_s)]
        return Capped().step(decode_view_of(0.0, [], ready, instance())).admit

    assert admitted(0.0165, 0.0165, 0.0165, 0.0165) == [0, 1, 2]
    assert admitted(0.05, 0.015, 0.05, 0.05) == [0, 1]  # the second is in with 14 ms, and then holds the third off
    assert admitted(0.05, 0.013, 0.05) == [0]  # it would itself be late; nobody overtakes it
    assert admitted(0.005, 0.05) == [0]  # an empty instance takes its first one untested


def test_capped_keeps_to_the_target_of_a_resident() -> None:
    view = decode_view_of(0.0, [on_time(0, tpot_target_s=0.013)], [on_time(1)], instance())

    assert (Capped().step(view).admit, Continuous().step(view).admit) == ([], [1])


# -- slack -------------------------------------------------------------------------------------------------------------


def test_slack_lets_only_the_shortest_take_part_when_the_step_of_all_is_too_long() -> None:
    # contexts 1, 2 and 3 thousand: 12, then 15, then 19 ms
    residents = [on_time(3, 3_000), on_time(1, 1_000), on_time(2, 2_000)]
    residents = [resident(r.request_id, r.context_tokens, tpot_target_s=0.02) for r in residents]
    view = decode_view_of(0.0, residents, instance=instance())

    assert Slack(h=1.0).step(view).step is None  # everyone: 19 <= 20
    assert Slack(h=0.9).step(view).step == [1, 2]  # 19 > 18
    assert Slack(h=0.1).step(view).step == [1]  # at least the shortest


def test_slack_admits_the_shortest_context_first_and_past_the_cap() -> None:
    ready = [on_time(0, 3_000), on_time(1, 1_000), on_time(2, 2_000)]
    view = decode_view_of(0.0, [], ready, instance(max_batch=1, kv_tokens=4_000))

    assert Slack().step(view).admit == [1, 2]
    assert Continuous().step(view).admit == [0]


# -- the paper's rule --------------------------------------------------------------------------------------------------


def test_the_papers_rule_keeps_the_shortest_while_the_smallest_slack_allows_it() -> None:
    # alone: 12, 13 and 30 ms; slacks 38, 37 and 20 ms, so s_min = 20. Steps: 12, then 10 + 2 + 3 = 15, where 2 / 15
    # is more than 1 / 12, then 10 + 3 + 22 = 35 > 20
    residents = [on_time(0, 1_000), on_time(1, 2_000), on_time(2, 19_000)]

    assert KairosPaper().step(decode_view_of(0.0, residents, instance=instance())).step == [0, 1]


def test_the_papers_rule_skips_who_would_lower_the_throughput() -> None:
    # targets 1 s, slack plenty: one in 12 ms is 83 a second; two in 10 + 2 + 31 = 43 ms are 47 a second
    residents = [on_time(0, 1_000, 1.0), on_time(1, 30_000, 1.0)]

    assert KairosPaper().step(decode_view_of(0.0, residents, instance=instance())).step == [0]


def test_one_resident_with_negative_slack_switches_the_papers_rule_off_for_all() -> None:
    # punctual: 30 ms allowed, 12 alone, slack 18; long: 50 allowed, 36 alone, slack 14; both together 10 + 2 + 26 = 38
    punctual, long = on_time(0, 1_000, 0.03), on_time(1, 25_000)
    late = overdue(2, 1_000)

    def participants(policy: KairosPaper | Slack | Envelope, *residents: Resident) -> set[object] | None:
        step = policy.step(decode_view_of(0.0, residents, instance=instance())).step
        return None if step is None else set(step)

    assert participants(KairosPaper(), punctual, long) == {0}
    assert participants(KairosPaper(), punctual, long, late) is None  # all of them, in 40 ms: punctual is late too
    assert participants(Slack(), punctual, long, late) == {0, 2}
    assert participants(Envelope(), punctual, long, late) == {0, 2}


def test_the_papers_rule_looks_steps_up_in_what_it_has_seen() -> None:
    # the prior says 12 ms; two steps of 20 and 40 ms for (batch 1, about 1,000 tokens) say 30: slack 20 ms, so 30 > 20
    residents = [on_time(0, 1_000), on_time(1, 30_000, NO_TARGET_S)]
    view = decode_view_of(0.0, residents, instance=instance())
    policy = KairosPaper()
    by_prior = policy.step(view).step

    policy.observe(DecodeStep(0.02, 1, 1_000, 1_000))
    policy.observe(DecodeStep(0.04, 1, 1_000, 1_000))

    assert by_prior == [0]
    assert policy.state.mean_s == {"1:3": pytest.approx(0.03)}
    assert policy.step(view).step is None


# -- envelope: steps of 10.5 ms + 1 ms a participant, whatever the contexts, h = 0.9 -----------------------------------
#
# With P = 0.9 x the tightest target, the budget of sum e / target is 0.9 - 10.5 ms / the tightest target.

FLAT_TIMES = step_times(decode=(0.0105, 1e-3, 0.0))


def flat(kv_tokens: int = NO_LIMIT) -> DecodeInstance:
    return decode_instance(times=FLAT_TIMES, kv_tokens=kv_tokens)


def plan(
    residents: Sequence[Resident] = (), ready: Sequence[Resident] = (), kv_tokens: int = NO_LIMIT, now_s: float = 0.0
) -> DecodePlan:
    return Envelope().step(decode_view_of(now_s, residents, ready, flat(kv_tokens)))


def test_envelope_with_one_target_admits_as_many_as_the_step_takes_within_its_share() -> None:
    # 40 ms: budget 0.9 - 0.2625 = 0.6375, each costs 1 / 40 = 0.025: 25; the same as 10.5 + 25 = 35.5 <= 36 ms
    ready = [on_time(n, tpot_target_s=0.04) for n in range(40)]

    assert len(plan(ready=ready).admit) == 25


def test_envelope_lets_relaxed_requests_in_beyond_one_step_of_all() -> None:
    # beside one with 40 ms the relaxed ones (80 ms) cost 1 / 80 = 0.0125: (0.6375 - 0.025) / 0.0125 = 49.
    # All 50 would take 60.5 ms, so not all take part in every step: 36 ms hold 25
    tight = on_time(0, tpot_target_s=0.04)
    joined = plan([tight], [on_time(n, tpot_target_s=0.08) for n in range(1, 50)])

    assert len(joined.admit) == 49
    assert joined.step is not None
    assert len(joined.step) == 25
    assert joined.step[0] == 0  # due first
    capped = Capped().step(decode_view_of(0.0, [tight], [on_time(n, tpot_target_s=0.08) for n in range(1, 50)], flat()))
    assert len(capped.admit) == 28  # 10.5 + 29 = 39.5 <= 40 ms


def test_envelope_keeps_the_class_that_yields_more_when_not_all_fit() -> None:
    # keep 40 ms: 0.6375 holds 51 relaxed ones at 0.0125, worth 51 / 0.08 = 637.5; keep 80 ms: 0.9 - 0.13125 = 0.76875
    # holds all 60, worth 750. So the tight ones count as overdue: one joins, 10.5 + 61 = 71.5 <= 72 ms
    tight = [on_time(n, tpot_target_s=0.04) for n in range(10)]
    relaxed = [on_time(100 + n, tpot_target_s=0.08) for n in range(60)]

    admitted = set(plan(ready=[*tight, *relaxed]).admit)

    assert admitted >= {r.request_id for r in relaxed}
    assert len(admitted & {r.request_id for r in tight}) == 1


def test_envelope_changes_the_kept_class_only_for_two_percent_more() -> None:
    # steps of 10.5 ms + 0.4 ms each. Keep 40 ms: 125 relaxed ones at 0.005 = 0.625 and one tight one at 0.01, worth
    # 1,587.5; keep 80 ms: all 125 relaxed ones, worth 1,562.5: 1.6 % less
    small = decode_instance(times=step_times(decode=(0.0105, 4e-4, 0.0)))
    people = [
        *(on_time(n, tpot_target_s=0.04) for n in range(3)),
        *(on_time(100 + n, tpot_target_s=0.08) for n in range(125)),
    ]
    fresh, held = Envelope(), Envelope()
    held.state.tpot_target_s = 0.08

    for policy in (fresh, held):
        policy.step(decode_view_of(0.0, people, instance=small))

    assert (fresh.state.tpot_target_s, held.state.tpot_target_s) == (0.04, 0.08)


def test_envelope_swaps_out_the_overdue_one_with_the_longest_context_when_only_kv_is_missing() -> None:
    residents = [overdue(0, 3_000), overdue(1, 4_000), on_time(2, 1_000)]
    newcomer = on_time(3, 5_000)

    joined = plan(residents, [newcomer], kv_tokens=10_000)

    # 8,000 + 5,000 + 4 do not fit; without the 4,000: 4,000 + 5,000 + 3 do
    assert (list(joined.swap_out), list(joined.admit)) == ([1], [3])


def test_envelope_swaps_out_nobody_who_can_recover() -> None:
    residents = [on_time(n, 3_000) for n in range(3)]

    joined = plan(residents, [on_time(3, 5_000)], kv_tokens=10_000)

    assert (list(joined.swap_out), list(joined.admit)) == ([], [])


def test_envelope_does_not_slow_everyone_down_for_a_target_that_no_batch_meets() -> None:
    # 11 ms: even an empty step of 10.5 ms is past 0.9 x 11; P is 0.9 x 50 ms
    hopeless = on_time(0, tpot_target_s=0.011)
    residents = [hopeless, *(on_time(n) for n in range(1, 31))]

    assert plan(residents).step is None  # everyone, in 41.5 ms
    assert Slack().step(decode_view_of(0.0, residents, instance=flat())).step == [0]


def test_envelope_runs_who_cannot_catch_up_in_spare_room_the_shortest_context_first() -> None:
    joined = plan([overdue(0)], [overdue(2, 4_000), overdue(1, 1_000)])

    assert (list(joined.admit), joined.step, list(joined.swap_out)) == ([1, 2], None, [])


# -- envelope: who can catch up, and in which order a step is filled ---------------------------------------------------


def test_envelope_gives_a_request_up_when_outputs_do_not_last_long_enough_to_catch_up() -> None:
    # at steps of 0.9 x 50 ms each token gains 5 ms: 0.4 s late take 80 tokens, 0.6 s take 120. All outputs had 100.
    # What tells them apart: only one that is given up is swapped out for the newcomer
    def swapped_out(late_s: float) -> Sequence[object]:
        policy = Envelope()
        policy.observe(DecodeStep(0.05, 1, 1_000, 1_000, [100] * 500))
        residents = [resident(0, 6_000, first_token_s=-0.05 - late_s), on_time(1, 1_000)]
        view = decode_view_of(0.0, residents, [on_time(2, 5_000)], flat(kv_tokens=10_000))
        return policy.step(view).swap_out

    assert swapped_out(0.4) == []
    assert swapped_out(0.6) == [0]


def test_envelope_steps_the_kept_ones_by_due_time() -> None:
    # 13 residents with 20 ms: P = 18 ms and a budget of 0.375 hold 7, the first admitted; the last of them is due first
    late = [overdue(n, tpot_target_s=0.02, since_s=2.0 - n) for n in (0, 1)]
    punctual = [resident(n, first_token_s=0.001 * (20 - n), tpot_target_s=0.02) for n in range(2, 15)]

    assert plan([*late, *punctual]).step == [8, 7, 6, 5, 4, 3, 2]


def test_envelope_gives_spare_room_in_the_step_to_those_that_are_late_beyond_catching_up() -> None:
    # P = 18 ms holds 7: all three punctual ones and four of the ten late ones, the longest due first
    late = [overdue(n, tpot_target_s=0.02, since_s=20.0 - n) for n in range(10)]
    punctual = [on_time(100 + n, tpot_target_s=0.02) for n in range(3)]

    assert plan([*late, *punctual]).step == [100, 101, 102, 0, 1, 2, 3]


def test_envelope_ends_a_gap_of_more_than_twenty_targets_first() -> None:
    # P = 18 ms holds 7 of 14 kept ones; without the gap it would be the one due last
    others = [on_time(n, tpot_target_s=0.02) for n in range(3)] + [on_time(n, tpot_target_s=0.08) for n in range(3, 13)]

    def takes_part(gap_s: float) -> bool:
        ahead = resident(99, output_tokens=60, first_token_s=-1.0, tpot_target_s=0.08, last_token_s=-gap_s)
        step = plan([*others, ahead]).step
        assert step is not None
        return 99 in step

    assert [takes_part(1.59), takes_part(1.61)] == [False, True]
