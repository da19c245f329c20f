"""Each prefill rule on a few requests, worked out by hand; most of all where two rules must differ.

A builder's request takes `prefill_s` at 1,000 tokens a second, and is due 10 s after arrival unless told otherwise.
"""

from collections.abc import Sequence

import pytest
from builders import prefill_instance, prefill_view, step_times, waiting

from kairos.policies.prefill.aged_sjf import AgedSjf
from kairos.policies.prefill.deadline_density import DeadlineDensity
from kairos.policies.prefill.edf import Edf
from kairos.policies.prefill.fcfs import Fcfs
from kairos.policies.prefill.kairos_paper import KairosPaper
from kairos.policies.prefill.lars import Lars
from kairos.policies.prefill.least_laxity import LeastLaxity
from kairos.policies.prefill.on_time import OnTime
from kairos.policies.prefill.short_first import ShortFirst
from kairos.policies.prefill.sjf import Sjf
from kairos.policies.prefill.srpt_feasible import SrptFeasible
from kairos.policies.prefill.urgency import Urgency
from kairos.scheduler_core.domain import RequestId, Waiting
from kairos.scheduler_core.policy import Peer, PrefillPolicy, PrefillStep
from kairos.scheduler_core.slo import NO_TARGET_S


def ordered(policy: PrefillPolicy, now_s: float, *requests: Waiting) -> Sequence[RequestId]:
    return policy.order(prefill_view(now_s, requests))


def planned(policy: OnTime | KairosPaper, now_s: float, *requests: Waiting) -> Sequence[RequestId]:
    return policy.plan(prefill_view(now_s, requests)).order


# -- orders by one number ----------------------------------------------------------------------------------------------


def test_fcfs_runs_the_oldest_and_of_one_instant_the_lowest_id() -> None:
    requests = waiting(2, arrival_s=1.0), waiting(3, arrival_s=0.5), waiting(1, arrival_s=1.0)

    assert ordered(Fcfs(), 2.0, *requests) == [3, 1, 2]


def test_sjf_runs_the_least_remaining_work_however_long_the_prompt_was() -> None:
    nearly_done = waiting("nearly-done", 0.5, prefilled_tokens=9_500)
    short = waiting("short", 1.0)

    assert ordered(Sjf(), 0.0, short, nearly_done) == ["nearly-done", "short"]


def test_aged_sjf_lets_a_long_prompt_pass_once_it_waited_long_enough() -> None:
    long = waiting("long", 4.0)
    # at 10 s: long (10 + 4) / 4 = 3.5, a 1 s prompt that came at 7 s (3 + 1) / 1 = 4, one that came at 9 s 2
    earlier, later = waiting("earlier", 1.0, arrival_s=7.0), waiting("later", 1.0, arrival_s=9.0)

    assert ordered(AgedSjf(), 10.0, long, earlier, later) == ["earlier", "long", "later"]


def test_edf_runs_a_later_arrival_with_the_earlier_deadline_first() -> None:
    first = waiting("first", ttft_target_s=8.0)
    tight = waiting("tight", arrival_s=1.0, ttft_target_s=2.0)

    assert ordered(Edf(), 1.0, first, tight) == ["tight", "first"]


def test_least_laxity_runs_the_least_margin_even_when_its_deadline_is_later() -> None:
    near = waiting("near", 1.0, ttft_target_s=10.0)  # margin 10 - 1 = 9
    long = waiting("long", 6.0, ttft_target_s=12.0)  # margin 12 - 6 = 6

    assert ordered(LeastLaxity(), 0.0, near, long) == ["long", "near"]
    assert ordered(Edf(), 0.0, near, long) == ["near", "long"]


def test_lars_measures_the_margin_in_whole_prompts() -> None:
    short = waiting("short", 1.0, ttft_target_s=4.0)  # margin 3 s = 3 of its prompts
    long = waiting("long", 8.0, ttft_target_s=12.0)  # margin 4 s = half of its prompt

    assert ordered(Lars(), 0.0, short, long) == ["long", "short"]
    assert ordered(LeastLaxity(), 0.0, short, long) == ["short", "long"]


def test_lars_counts_the_whole_prompt_of_one_that_is_half_done() -> None:
    # both have a margin of 4 s; the half-done one is 8 s of work altogether, so 4 / 8 against 4 / 4
    half_done = waiting("half-done", 4.0, ttft_target_s=8.0, total_prefill_s=8.0)
    fresh = waiting("fresh", 4.0, ttft_target_s=8.0)

    assert ordered(Lars(), 0.0, fresh, half_done) == ["half-done", "fresh"]


# -- classes -----------------------------------------------------------------------------------------------------------


def test_short_first_splits_at_256_tokens_and_keeps_arrival_order_in_each_class() -> None:
    requests = [
        waiting("long-old", prompt_tokens=257),
        waiting("short-old", arrival_s=1.0, prompt_tokens=256),
        waiting("long-new", arrival_s=2.0, prompt_tokens=9_000),
        waiting("short-new", arrival_s=3.0, prompt_tokens=10),
    ]

    assert ordered(ShortFirst(), 5.0, *requests) == ["short-old", "short-new", "long-old", "long-new"]


def test_short_first_promotes_a_long_prompt_that_waited_longer_than_its_limit() -> None:
    long = waiting("long", prompt_tokens=9_000)
    short = waiting("short", arrival_s=1.0, prompt_tokens=10)

    assert ordered(ShortFirst(long_max_wait_s=10.0), 10.0, long, short) == ["short", "long"]
    assert ordered(ShortFirst(long_max_wait_s=10.0), 10.1, long, short) == ["long", "short"]


def test_srpt_feasible_runs_the_shortest_in_time_then_the_lost_oldest_first() -> None:
    requests = [
        waiting("lost-old", 9.0, ttft_target_s=5.0),
        waiting("lost-new", 0.5, arrival_s=0.1, ttft_target_s=0.3),
        waiting("longer", 3.0, arrival_s=0.2),
        waiting("shorter", 1.0, arrival_s=0.3),
    ]

    assert ordered(SrptFeasible(), 0.5, *requests) == ["shorter", "longer", "lost-old", "lost-new"]


def test_deadline_density_keeps_deadline_order_while_every_deadline_fits() -> None:
    # ends at 5, 7 and 8 s
    requests = [waiting("a", 5.0, ttft_target_s=6.0), waiting("b", 2.0, ttft_target_s=7.0), waiting("c", 1.0)]

    assert ordered(DeadlineDensity(), 0.0, *requests) == ["a", "b", "c"]


def test_deadline_density_goes_by_density_up_to_the_first_deadline_that_does_not_fit() -> None:
    # b would end at 7 s, past its 6.5: a and b compete, the shorter first; c behind them keeps its place
    requests = [waiting("a", 5.0, ttft_target_s=6.0), waiting("b", 2.0, ttft_target_s=6.5), waiting("c", 1.0)]

    assert ordered(DeadlineDensity(), 0.0, *requests) == ["b", "a", "c"]


# -- urgency, and the paper's own rule ---------------------------------------------------------------------------------


def test_urgency_runs_the_highest_share_of_its_target_first() -> None:
    half = waiting("half", 2.0, ttft_target_s=10.0)  # (5 + 2) / 10 = 0.7
    tight = waiting("tight", 1.0, arrival_s=3.0, ttft_target_s=4.0)  # (2 + 1) / 4 = 0.75

    assert ordered(Urgency(), 5.0, half, tight) == ["tight", "half"]


def test_a_lost_request_waits_behind_every_request_that_can_still_be_in_time() -> None:
    lost = waiting("lost", 5.0, ttft_target_s=1.0)
    tight = waiting("tight", 1.5, ttft_target_s=2.0)

    assert ordered(Urgency(), 0.0, lost, tight) == ["tight", "lost"]


def test_urgency_of_exactly_one_is_still_in_time() -> None:
    exact = waiting("exact", 2.0, ttft_target_s=2.0)

    assert ordered(Urgency(), 0.0, waiting("easy", 1.0), exact) == ["exact", "easy"]


def test_the_papers_rule_calls_a_short_late_arrival_lost_because_arrival_order_would_lose_it() -> None:
    # at 10 s: in arrival order long ends at 18 s (20 s allowed), short at 19 s (14 s allowed)
    long = waiting("long", 8.0, ttft_target_s=20.0)
    short = waiting("short", 1.0, arrival_s=9.0, ttft_target_s=5.0)

    assert planned(KairosPaper(), 10.0, long, short) == ["long", "short"]
    # run the other way round, both are in time: short ends at 11 s, long at 19 s
    assert planned(OnTime(), 10.0, long, short) == ["short", "long"]


def test_the_papers_rule_runs_a_long_lost_request_before_a_short_one_that_is_older() -> None:
    # at 100 s, targets 10 s: short ends at 100.1, -9.01 / 100 tokens; long at 110.1, -5.01 / 10,000 tokens
    short = waiting("short", 0.1)
    long = waiting("long", 10.0, arrival_s=50.0)

    assert planned(KairosPaper(), 100.0, short, long) == ["long", "short"]
    assert planned(OnTime(), 100.0, short, long) == ["short", "long"]
    assert ordered(Urgency(), 100.0, short, long) == ["short", "long"]


def test_the_papers_rule_runs_a_long_lost_request_before_a_short_one_that_could_be_in_time() -> None:
    # at 10 s: hopeless ends at 20 s, -(10 - 5) / 5 / 10,000 tokens = -3e-4 after its 5 s;
    # in arrival order short ends at 20.1 s, (8 - 10.1) / 8 / 100 tokens = -2.6e-3; alone it would end at 10.1 s
    hopeless = waiting("hopeless", 10.0, ttft_target_s=5.0)
    short = waiting("short", 0.1, arrival_s=10.0, ttft_target_s=8.0)

    assert planned(KairosPaper(), 10.0, hopeless, short) == ["hopeless", "short"]
    assert planned(OnTime(), 10.0, hopeless, short) == ["short", "hopeless"]


def test_the_papers_rule_predicts_with_the_mean_rate_of_the_steps_so_far() -> None:
    # prior rate 1,000 a second: first ends at 4 s, (5 - 4) / 5 / 4,000 = 5e-5; second at 5 s, (4 - 5) / 4 / 1,000 < 0
    requests = waiting("first", 4.0, ttft_target_s=5.0), waiting("second", 1.0, ttft_target_s=4.0)
    policy = KairosPaper()
    by_prior = planned(policy, 0.0, *requests)

    # 3,000 + 1,000 tokens in 0.5 + 1.5 s: 2,000 a second; first 3 / 5 / 4,000 = 1.5e-4, second 1.5 / 4 / 1,000 = 3.8e-4
    policy.observe(PrefillStep(0.5, 3_000))
    policy.observe(PrefillStep(1.5, 1_000))

    assert by_prior == ["first", "second"]
    assert planned(policy, 0.0, *requests) == ["second", "first"]


def test_the_papers_rule_fills_the_step_to_its_token_budget() -> None:
    requests = [waiting(n, 1.0) for n in range(4)]

    def together(chunk_tokens: int | None, most: int) -> int:
        instance = prefill_instance(chunk_tokens=chunk_tokens, max_requests_per_step=most)
        return KairosPaper().plan(prefill_view(0.0, requests, instance=instance)).together

    assert together(2_048, 8) == 3  # the third one is split after 48 tokens
    assert together(2_000, 8) == 2
    assert together(2_048, 2) == 2
    assert together(None, 8) == 1  # no token budget: nothing says where to stop


def test_the_papers_rule_orders_requests_without_a_target_shortest_first() -> None:
    requests = [waiting(n, 3.0 - n, ttft_target_s=NO_TARGET_S) for n in range(3)]

    assert planned(KairosPaper(), 0.0, *requests) == [2, 1, 0]


# -- on-time -----------------------------------------------------------------------------------------------------------


def test_on_time_drops_the_largest_work_when_a_deadline_would_be_missed() -> None:
    # 4, 6, then 9 > 7: the 4 s request leaves, the others end at 2 and 5 s
    requests = [
        waiting("a", 4.0, ttft_target_s=5.0),
        waiting("b", 2.0, ttft_target_s=6.0),
        waiting("c", 3.0, ttft_target_s=7.0),
    ]

    assert planned(OnTime(), 0.0, *requests) == ["b", "c", "a"]
    assert ordered(Edf(), 0.0, *requests) == ["a", "b", "c"]


def test_on_time_runs_kept_ones_by_deadline_then_dropped_by_length_then_lost_by_age() -> None:
    requests = [
        waiting("lost-new", 9.0, arrival_s=0.2, ttft_target_s=1.0),
        waiting("lost-old", 2.0, ttft_target_s=1.0),
        waiting("drop-long", 4.0, arrival_s=1.0, ttft_target_s=4.0),
        waiting("drop-short", 3.5, arrival_s=1.0, ttft_target_s=4.2),
        waiting("keep-late", 2.0, arrival_s=1.0, ttft_target_s=5.0),
        waiting("keep-soon", 2.0, arrival_s=1.0, ttft_target_s=4.5),
    ]

    assert planned(OnTime(), 1.0, *requests) == [
        "keep-soon",
        "keep-late",
        "drop-short",
        "drop-long",
        "lost-old",
        "lost-new",
    ]


def test_on_time_counts_what_remains_of_an_unfinished_prompt_not_what_it_was() -> None:
    # 1 s of 8 s remains: 1, then 4 <= 4
    begun = waiting("begun", 1.0, ttft_target_s=4.0, prefilled_tokens=7_000, total_prefill_s=8.0)
    short = waiting("short", 3.0, ttft_target_s=4.0)
    other = waiting("other", 2.0, ttft_target_s=4.0)

    assert planned(OnTime(), 0.0, begun, short, other) == ["begun", "other", "short"]


def test_on_time_drops_the_larger_id_of_equal_works() -> None:
    requests = [waiting(n, 2.0, ttft_target_s=5.0) for n in range(3)]

    assert planned(OnTime(), 0.0, *requests) == [0, 1, 2]


def test_on_time_keeps_the_weightier_of_equal_works() -> None:
    light, heavy = waiting(0, 3.0, ttft_target_s=5.0), waiting(1, 3.0, ttft_target_s=5.0, weight=2.0)

    assert planned(OnTime(), 0.0, light, heavy) == [1, 0]


def test_on_time_leaves_to_an_idle_peer_what_both_cannot_do_here() -> None:
    requests = [waiting(n, 4.0, ttft_target_s=5.0) for n in range(3)]

    plan = OnTime().plan(prefill_view(0.0, requests, peers=[Peer("prefill-1", free_at_s=0.0)]))

    assert list(plan.order) == [0, 1, 2]  # 0 here, 1 on the peer, 2 fits nowhere


def test_on_time_gives_a_request_to_the_peer_that_would_end_it_first() -> None:
    # the peer is busy for 1 s. As fast as this one, it would end slow at 5 s, later than the 4 s here; twice as fast,
    # at 3 s, so that slow is left to it and short runs here
    requests = waiting("slow", 4.0, ttft_target_s=5.0), waiting("short", 2.0, ttft_target_s=5.5)
    peers = {
        "equal": Peer("prefill-1", free_at_s=1.0),
        "fast": Peer("prefill-1", free_at_s=1.0, prefill_s=lambda w: w.prefill_s / 2),
    }

    first = {name: OnTime().plan(prefill_view(0.0, requests, peers=[peer])).order[0] for name, peer in peers.items()}

    assert first == {"equal": "slow", "fast": "short"}


def test_on_time_counts_what_a_peer_has_begun_against_the_peer() -> None:
    # the peer must still do 4 s of its own by 4.5 s; so both of the queue compete for this instance, and 0 is longer
    begun = waiting(9, 4.0, ttft_target_s=4.5, prefilled_tokens=4_000)
    requests = [waiting(0, 3.0, ttft_target_s=5.0), waiting(1, 2.5, ttft_target_s=5.0)]

    alone = OnTime().plan(prefill_view(0.0, requests, peers=[Peer("prefill-1", free_at_s=0.0)]))
    beside = OnTime().plan(prefill_view(0.0, requests, peers=[Peer("prefill-1", free_at_s=0.0, bound=[begun])]))

    assert list(alone.order) == [0, 1]
    assert list(beside.order) == [1, 0]


@pytest.mark.parametrize(
    ("first_target_s", "most", "chunk_tokens", "expected"),
    [
        (10.0, 8, 8_192, 3),  # 300 + 300 + 300 tokens: the fixed 0.1 s is a tenth of the step at 900
        (10.0, 2, 8_192, 2),  # the instance takes no more
        (10.0, 8, 700, 2),  # nor does the step's token budget
        (0.75, 8, 8_192, 2),  # two end at 0.7 s, three at 1.0 s
        (0.5, 8, 8_192, 1),  # alone it ends at 0.4 s
        (10.0, 8, None, 1),  # whole prompts: no token budget to share
    ],
)
def test_on_time_shares_a_step_up_to_the_knee_while_nobody_kept_turns_late(
    first_target_s: float, most: int, chunk_tokens: int | None, expected: int
) -> None:
    instance = prefill_instance(
        times=step_times(prefill=(0.1, 1e-3, 0.0)), chunk_tokens=chunk_tokens, max_requests_per_step=most
    )
    first = waiting(0, 0.4, prompt_tokens=300, ttft_target_s=first_target_s)
    others = [waiting(n, 0.4, prompt_tokens=300, ttft_target_s=20.0) for n in range(1, 5)]

    assert OnTime().plan(prefill_view(0.0, [first, *others], instance=instance)).together == expected
