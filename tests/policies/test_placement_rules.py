"""Each placement rule on a few instances, worked out by hand."""

from builders import decode_instance, prefill_instance, resident, step_times, waiting

from kairos.policies.decode_placement.best_fit import BestFit
from kairos.policies.decode_placement.class_affinity import ClassAffinity
from kairos.policies.decode_placement.headroom import Headroom
from kairos.policies.decode_placement.least_context import LeastContext
from kairos.policies.decode_placement.least_requests import LeastRequests
from kairos.policies.prefill_placement.late import Late
from kairos.policies.prefill_placement.least_loaded import LeastLoaded
from kairos.policies.prefill_placement.least_work import LeastWork
from kairos.policies.prefill_placement.prefix_affinity import PrefixAffinity
from kairos.policies.prefill_placement.round_robin import RoundRobin
from kairos.policies.prefill_placement.token_load import TokenLoad
from kairos.scheduler_core.policy import (
    DecodeLoad,
    DecodePlacementPolicy,
    DecodePlacementView,
    PrefillLoad,
    PrefillPlacementPolicy,
    PrefillPlacementView,
)
from kairos.scheduler_core.slo import NO_TARGET_S

# -- prefill -----------------------------------------------------------------------------------------------------------


def prefill_load(
    name: str, tokens: int = 0, outstanding_s: float = 0.0, cached: int = 0, prefill_s: float = 1.0
) -> PrefillLoad:
    return PrefillLoad(prefill_instance(name), 0, tokens, outstanding_s, prefill_s, cached)


def prefill_place(policy: PrefillPlacementPolicy, *loads: PrefillLoad) -> str | None:
    return policy.place_prefill(PrefillPlacementView(0.0, waiting("r"), loads))


def test_late_binds_nobody() -> None:
    assert prefill_place(Late(), prefill_load("a"), prefill_load("b")) is None


def test_round_robin_deals_arrivals_out_the_first_to_the_first() -> None:
    policy, loads = RoundRobin(), [prefill_load("a"), prefill_load("b"), prefill_load("c")]

    assert [prefill_place(policy, *loads) for _ in range(4)] == ["a", "b", "c", "a"]


def test_round_robin_goes_on_when_an_instance_has_left() -> None:
    policy, loads = RoundRobin(), [prefill_load("a"), prefill_load("b"), prefill_load("c")]
    for _ in range(3):
        prefill_place(policy, *loads)

    assert [prefill_place(policy, *loads[:2]) for _ in range(3)] == ["b", "a", "b"]


def test_least_loaded_counts_tokens_and_least_work_counts_seconds() -> None:
    # the second holds fewer tokens, but they are further into their contexts and take longer
    loads = prefill_load("many-tokens", 9_000, 3.0), prefill_load("long-work", 6_000, 5.0)

    assert prefill_place(LeastLoaded(), *loads) == "long-work"
    assert prefill_place(LeastWork(), *loads) == "many-tokens"


def test_least_work_counts_the_request_itself_where_it_would_run() -> None:
    # 2 + 1 s on the busy one with the prefix in its cache, 0 + 4 s on the idle one
    loads = prefill_load("idle", prefill_s=4.0), prefill_load("busy", outstanding_s=2.0, prefill_s=1.0)

    assert prefill_place(LeastWork(), *loads) == "busy"


def test_prefix_affinity_follows_the_longest_hit_into_any_queue_and_token_load_does_not() -> None:
    loads = prefill_load("crowded", 40_000, cached=4_096), prefill_load("warm", 9_000, cached=512), prefill_load("cold")

    assert prefill_place(PrefixAffinity(), *loads) == "crowded"
    assert prefill_place(TokenLoad(limit_tokens=32_768), *loads) == "warm"
    assert prefill_place(TokenLoad(limit_tokens=40_000), *loads) == "crowded"
    assert prefill_place(TokenLoad(limit_tokens=8_999), *loads) == "cold"


def test_without_a_hit_both_affinities_take_the_fewest_tokens() -> None:
    loads = prefill_load("a", 300), prefill_load("b", 200), prefill_load("c", 200)

    assert prefill_place(PrefixAffinity(), *loads) == "b"
    assert prefill_place(TokenLoad(), *loads) == "b"


def test_token_load_ignores_hits_when_every_instance_is_over_its_limit() -> None:
    loads = prefill_load("hit", 500, cached=4_096), prefill_load("less", 400)

    assert prefill_place(TokenLoad(limit_tokens=100), *loads) == "less"


# -- decode ------------------------------------------------------------------------------------------------------------

# steps of 10 ms + 1 ms a request + 1 us a context token
TIMES = step_times(decode=(0.01, 1e-3, 1e-6))
FAST_TIMES = step_times(decode=(0.005, 5e-4, 5e-7))


def decode_load(
    name: str, batch_size: int = 0, context: int = 0, waiting_requests: int = 0, waiting_context: int = 0,
    tightest_tpot_s: float = NO_TARGET_S, fast: bool = False,
) -> DecodeLoad:  # fmt: skip
    instance = decode_instance(name, times=FAST_TIMES if fast else TIMES)
    return DecodeLoad(instance, batch_size, context, waiting_requests, waiting_context, tightest_tpot_s)


def decode_place(policy: DecodePlacementPolicy, *loads: DecodeLoad, tpot_target_s: float = 0.05) -> str:
    request = resident("r", context_tokens=1_000, tpot_target_s=tpot_target_s)
    return policy.place_decode(DecodePlacementView(0.0, request, loads))


def test_least_requests_counts_who_waits_too_and_takes_the_first_of_equals() -> None:
    loads = decode_load("a", 2, waiting_requests=2), decode_load("b", 3), decode_load("c", 1, waiting_requests=2)

    assert decode_place(LeastRequests(), *loads) == "b"


def test_least_context_counts_tokens_where_least_requests_counts_heads() -> None:
    loads = decode_load("long", 1, 9_000), decode_load("short", 4, 3_000, 1, 2_000)

    assert decode_place(LeastContext(), *loads) == "short"
    assert decode_place(LeastRequests(), *loads) == "long"


def test_headroom_takes_the_smallest_share_of_the_tightest_target_there() -> None:
    # with the request: relaxed 10 + 20 + 10 = 40 ms of its own 50 ms target; tight 10 + 3 + 3 = 16 ms of 19 ms
    relaxed = decode_load("relaxed", 19, 9_000, tightest_tpot_s=0.1)
    tight = decode_load("tight", 2, 2_000, tightest_tpot_s=0.019)

    assert decode_place(Headroom(), relaxed, tight) == "relaxed"
    assert decode_place(LeastRequests(), relaxed, tight) == "tight"
    # a request with a 20 ms target of its own makes 2.0 of it there and 0.84 here
    assert decode_place(Headroom(), relaxed, tight, tpot_target_s=0.02) == "tight"


def test_headroom_counts_who_waits_there_as_if_resident() -> None:
    # 10 + 2 + 2 = 14 ms; 10 + 5 + 2 = 17 ms with the three that wait
    loads = decode_load("crowd-waits", 1, 500, 3, 500), decode_load("calm", 1, 1_000)

    assert decode_place(Headroom(), *loads) == "calm"


def test_headroom_uses_the_step_times_of_each_instance() -> None:
    # 5 + 0.5 x 8 + 3 = 12 ms on the fast one with seven, 10 + 2 + 2 = 14 ms on the other with one
    loads = decode_load("slow", 1, 1_000), decode_load("fast", 7, 5_000, fast=True)

    assert decode_place(Headroom(), *loads) == "fast"


def test_headroom_without_any_target_takes_the_shortest_step() -> None:
    loads = decode_load("a", 5, 5_000), decode_load("b", 1, 1_000)

    assert decode_place(Headroom(), *loads, tpot_target_s=NO_TARGET_S) == "b"


def test_best_fit_fills_the_fullest_that_stays_in_time_where_headroom_takes_the_emptiest() -> None:
    # steps with the request: 12, 34 and 56 ms against 50 ms
    loads = decode_load("empty"), decode_load("half", 12, 10_000), decode_load("full", 24, 20_000)

    assert decode_place(BestFit(), *loads) == "half"
    assert decode_place(Headroom(), *loads) == "empty"


def test_best_fit_takes_the_shortest_step_when_none_stays_in_time() -> None:
    loads = decode_load("worse", 60), decode_load("bad", 50)

    assert decode_place(BestFit(), *loads) == "bad"


def test_class_affinity_keeps_to_its_class_where_headroom_mixes() -> None:
    # relaxed with the request: 10 + 13 + 11 = 34 ms of 100; tight: 10 + 2 + 2 = 14 ms of 25
    relaxed = decode_load("relaxed", 12, 10_000, tightest_tpot_s=0.1)
    tight = decode_load("tight", 1, 1_000, tightest_tpot_s=0.025)
    # a tight request takes 34 of 25 ms on relaxed and 14 of 25 on tight; a relaxed one 34 of 100 and 14 of 25
    crowded = decode_load("crowded", 8, 7_000, tightest_tpot_s=0.025)  # 10 + 9 + 8 = 27 of 25 ms
    empty_handed = decode_load("a-little", 2, 2_000, tightest_tpot_s=0.1)  # 10 + 3 + 3 = 16 of 25 ms for a tight one

    assert decode_place(ClassAffinity(), relaxed, tight, tpot_target_s=0.1) == "relaxed"
    assert decode_place(ClassAffinity(), crowded, empty_handed, tpot_target_s=0.025) == "crowded"
    assert decode_place(Headroom(), crowded, empty_handed, tpot_target_s=0.025) == "a-little"


def test_class_affinity_spills_over_when_its_own_class_is_that_much_fuller() -> None:
    own = decode_load("own", 40, 40_000, tightest_tpot_s=0.025)  # 10 + 41 + 41 = 92 of 25 ms
    other = decode_load("other", 1, 1_000, tightest_tpot_s=0.1)  # 14 of 25 ms

    assert decode_place(ClassAffinity(spill_share=0.5), own, other, tpot_target_s=0.025) == "other"
    assert decode_place(ClassAffinity(spill_share=0.0), own, other, tpot_target_s=0.025) == "own"


def test_class_affinity_takes_an_empty_instance_for_its_own() -> None:
    own = decode_load("own", 2, 2_000, tightest_tpot_s=0.025)

    assert decode_place(ClassAffinity(), own, decode_load("empty"), tpot_target_s=0.025) == "empty"
