"""Golden runs of the reference itself: a handful of requests, every time worked out by hand in the comment."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from simulator.cases import CASES, Case, decode, prefill, strategy
from simulator.reference import Request, Result, Spec, simulate

FREE = {"bytes_per_token": 0, "bytes_per_s": 1.0, "latency_s": 0.0}
LATE_S = 1000.0  # a target that nothing here misses


def run(
    requests: list[Request],
    how: dict[str, Any],
    prefills: list[Spec],
    decodes: Sequence[Spec] = (decode(1.0, 0.0, 0.0),),
    first_token: str = "prefill",
    transfer: dict[str, Any] = FREE,
) -> Result:
    handover = {"first_token": first_token, "place_decode": "at_ready"}
    fleet = {"prefill": prefills, "decode": list(decodes), "kv_transfer": transfer, "handover": handover}
    return simulate(requests, fleet, how)


def first_tokens(result: Result) -> list[float | None]:
    return [row.first_token_s for row in result.rows]


def last_tokens(result: Result) -> list[float | None]:
    return [row.last_token_s for row in result.rows]


def steps_of(result: Result, instance: str) -> list[tuple[float, float, tuple[int, ...]]]:
    return [(step.start_s, step.end_s, step.request_ids) for step in result.steps if step.instance == instance]


ONE_SECOND = prefill(1.0, 0.0, 0.0, None)


def test_a_request_passes_through_prefill_transfer_and_decode() -> None:
    # Prefill 1 + n/256 + n*n/2/65536: 256 tokens 2.5 s, 512 tokens 5 s. Transfer 0.5 + n/512: 1 s and 1.5 s.
    # Prefill r0 0-2.5, r1 2.5-7.5 (one token: done), r2 7.5-10, r3 10-12.5, idle until r4 20-25.
    # Ready r0 3.5, r2 11, r3 13.5, r4 26.5; a decode step alone takes 1.5 s: r0 5, 6.5; r2 12.5; r3 15; r4 28.
    # Longest gaps: r0 5-2.5, r2 12.5-10, r3 15-12.5, r4 28-25.
    requests = [
        (0.0, 256, 3, LATE_S, LATE_S),
        (0.0, 512, 1, LATE_S, LATE_S),
        (1.0, 256, 2, LATE_S, LATE_S),
        (4.0, 256, 2, LATE_S, LATE_S),
        (20.0, 512, 2, LATE_S, LATE_S),
    ]
    transfer = {"bytes_per_token": 2, "bytes_per_s": 1024, "latency_s": 0.5}

    result = run(
        requests, strategy("fcfs"), [prefill(1.0, 2**-8, 2**-16, None)], [decode(1.0, 0.5, 0.0)], transfer=transfer
    )

    assert result.rows == [
        (0, 0, 0.0, 2.5, 3.5, 6.5, 2.5, "finished"),
        (0, None, 2.5, 7.5, None, 7.5, None, "finished"),
        (0, 0, 7.5, 10.0, 11.0, 12.5, 2.5, "finished"),
        (0, 0, 10.0, 12.5, 13.5, 15.0, 2.5, "finished"),
        (0, 0, 20.0, 25.0, 26.5, 28.0, 3.0, "finished"),
    ]


def test_each_chunk_pays_the_fixed_cost_and_attends_to_what_was_prefilled_before() -> None:
    # 640 tokens in chunks of 256: 1 + 1 + 256*128/65536 = 2.5; 1 + 1 + 256*(256+128)/65536 = 3.5;
    # the last 128: 1 + 0.5 + 128*(512+64)/65536 = 2.625. Together 8.625.
    result = run([(0.0, 640, 1, LATE_S, LATE_S)], strategy("fcfs"), [prefill(1.0, 2**-8, 2**-16, 256)])

    assert steps_of(result, "prefill-0") == [(0.0, 2.5, (0,)), (2.5, 6.0, (0,)), (6.0, 8.625, (0,))]
    assert [step.sum_context_tokens for step in result.steps] == [0, 256, 512]


# r0 runs 0-4. Then wait: r1 (arrival 1, 2 s, deadline 12), r2 (2, 1 s, 13), r3 (3, 3 s, 12.5) and r4 (3.5, 0.5 s,
# 4.25), which is lost.
RULES = {
    # By arrival.
    ("fcfs", False): [6, 7, 10, 10.5],
    ("fcfs", True): [6, 7, 10, 10.5],
    # By seconds: r4, r2, r1, r3; without the lost one r2, r1, r3.
    ("sjf", False): [7.5, 5.5, 10.5, 4.5],
    ("sjf", True): [7, 5, 10, 10.5],
    # By deadline: r4, r1, r3, r2.
    ("edf", False): [6.5, 10.5, 9.5, 4.5],
    ("edf", True): [6, 10, 9, 10.5],
    # At 4: r1 (3+2)/2 = 2.5, r2 (2+1)/1 = 3, r3 (1+3)/3, r4 (.5+.5)/.5 = 2: r2. At 5: r1 3, r3 5/3, r4 4: r4. Then r1.
    ("aged-sjf", False): [7.5, 5, 10.5, 5.5],
    ("aged-sjf", True): [7, 5, 10, 10.5],
    # At 4: r1 12-4-2 = 6, r2 13-4-1 = 8, r3 12.5-4-3 = 5.5, r4 -0.25: r4, then r3 (all others fall alike), r1, r2.
    ("least-laxity", False): [9.5, 10.5, 7.5, 4.5],
    ("least-laxity", True): [9, 10, 7, 10.5],
    # At 4: r1 5/11, r2 3/11, r3 4/9.5, r4 1/0.75 > 1: r1. At 6: r2 5/11, r3 6/9.5: r3. Then r2, and r4 behind all.
    ("urgency", False): [6, 10, 9, 10.5],
    ("urgency", True): [6, 10, 9, 10.5],
}


@pytest.mark.parametrize(("rule", "lost_last"), RULES)
def test_a_rule_orders_the_queue_as_its_definition_says(rule: str, lost_last: bool) -> None:
    requests = [
        (0.0, 512, 1, 8.0, LATE_S),
        (1.0, 256, 1, 11.0, LATE_S),
        (2.0, 128, 1, 11.0, LATE_S),
        (3.0, 384, 1, 9.5, LATE_S),
        (3.5, 64, 1, 0.75, LATE_S),
    ]

    result = run(requests, strategy(rule, lost_last), [prefill(0.0, 2**-7, 0.0, None)])

    assert first_tokens(result) == [4, *RULES[rule, lost_last]]


CHUNKED: list[Request] = [
    (0.0, 1024, 1, 20.0, LATE_S),  # 8 s in 4 chunks, deadline 20
    (1.0, 256, 1, 3.0, LATE_S),  # 2 s, deadline 4
    (2.0, 512, 1, 5.0, LATE_S),  # 4 s, deadline 7
    (2.0, 256, 1, 30.0, LATE_S),  # 2 s, deadline 32
    (9.0, 512, 1, 3.0, LATE_S),  # 4 s, deadline 12: lost on arrival
]


def test_with_preempt_an_unfinished_prompt_competes_again_at_every_chunk_end() -> None:
    # At 2: r1 can end at 4 = its deadline, so it is not lost, and the earliest: 2-4. At 4: r2 4+4 > 7 is lost; r0 (20)
    # before r3 (32): 4-6, 6-8, 8-10. At 10: r3 10-12. Then the lost ones, oldest first: r2 12-16, r4 16-20.
    how = strategy("edf", lost_last=True, preempt=True)

    result = run(CHUNKED, how, [prefill(1.0, 2**-8, 0.0, 256)])

    assert first_tokens(result) == [10, 4, 16, 12, 20]


def test_without_preempt_an_unfinished_prompt_goes_on() -> None:
    # r0 0-8. At 8 r1 and r2 are lost: r3 8-10, then oldest first r1 10-12, r2 12-16, r4 16-20.
    result = run(CHUNKED, strategy("edf", lost_last=True), [prefill(1.0, 2**-8, 0.0, 256)])

    assert first_tokens(result) == [8, 12, 16, 10, 20]


def test_late_placement_binds_a_request_to_the_instance_that_first_runs_it() -> None:
    # Instance 0 needs 4 s, instance 1 needs 1 s. At 0 instance 0 decides first and takes r0; the rest goes to 1.
    fleet = [prefill(4.0, 0.0, 0.0, None), ONE_SECOND]

    result = run([(0.0, 10, 1, LATE_S, LATE_S)] * 5, strategy("fcfs"), fleet)

    assert [(row.prefill_instance, row.first_token_s) for row in result.rows] == [
        (0, 4),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
    ]


def test_round_robin_deals_arrivals_out_in_id_order() -> None:
    fleet = [prefill(4.0, 0.0, 0.0, None), ONE_SECOND]

    result = run([(0.0, 10, 1, LATE_S, LATE_S)] * 5, strategy("fcfs", placement="round-robin"), fleet)

    assert [(row.prefill_instance, row.first_token_s) for row in result.rows] == [
        (0, 4),
        (1, 1),
        (0, 8),
        (1, 2),
        (0, 12),
    ]


def test_an_unfinished_prompt_stays_with_its_instance() -> None:
    # Chunks of 2 s. r0 (4 chunks, deadline 100) starts on instance 0, r1 (1 chunk) on 1. At 2 r2 (deadline 10) and r3
    # (11) arrive: instance 0 takes r2 2-4, instance 1 r3 2-4. From 4 on instance 1 idles, while r0 goes on at 0: 4-10.
    requests = [
        (0.0, 1024, 1, 100.0, LATE_S),
        (0.0, 256, 1, 100.0, LATE_S),
        (2.0, 256, 1, 8.0, LATE_S),
        (2.0, 256, 1, 9.0, LATE_S),
    ]

    result = run(requests, strategy("edf", preempt=True), [prefill(1.0, 2**-8, 0.0, 256)] * 2)

    assert [(row.prefill_instance, row.first_token_s) for row in result.rows] == [(0, 10), (1, 2), (0, 4), (1, 4)]


def test_at_one_instant_ends_come_before_arrivals_and_arrivals_before_decisions() -> None:
    # r0 0-2. r1 (3 s) waits since 1; r2 (1 s) arrives at 2 exactly and is the shorter one: 2-3, then r1 3-6.
    requests = [(0.0, 512, 1, LATE_S, LATE_S), (1.0, 768, 1, LATE_S, LATE_S), (2.0, 256, 1, LATE_S, LATE_S)]

    result = run(requests, strategy("sjf"), [prefill(0.0, 2**-8, 0.0, None)])

    assert first_tokens(result) == [2, 6, 3]


def test_least_requests_sees_what_ended_at_the_same_instant() -> None:
    # Ready at 1, 2, 3, 4, 5. r0 (one step, 1-2) is gone when r1 is placed: again instance 0. Then the loads are (1, 0):
    # r2 to 1; (1, 1): r3 to 0; (2, 1): r4 to 1.
    outputs = [2, 9, 9, 9, 9]

    result = run(
        [(0.0, 10, output, LATE_S, LATE_S) for output in outputs],
        strategy("fcfs"),
        [ONE_SECOND],
        [decode(1.0, 0.0, 0.0)] * 2,
    )

    assert [row.decode_instance for row in result.rows] == [0, 0, 1, 0, 1]


def test_the_last_admitted_is_swapped_out_and_waits_in_front() -> None:
    # Five prompts of 10, four tokens each, ready at 1 to 5 with context 11; steps of 1 s; 25 KV tokens.
    # 1: r0 runs. 2: r0 12 + r1 11 + 2 = 25 fits. 3: 13 + 12 + 2 = 27: r1 out. r0 ends at 4.
    # 4: r1 12 + r2 11 + 2 fits. 5: 27 again: r2 out (before r3, r4). r1 ends at 6. 6: r2, r3. 7: r3 out. r2 ends at 8.
    # 8: r3, r4. 9: r4 out. r3 ends at 10. r4 alone: 11, 12.
    # Tokens: r0 1 2 3 4; r1 2 3 5 6; r2 3 5 7 8; r3 4 7 9 10; r4 5 9 11 12.
    result = run([(0.0, 10, 4, LATE_S, LATE_S)] * 5, strategy("fcfs"), [ONE_SECOND], [decode(1.0, 0.0, 0.0, kv=25)])

    assert last_tokens(result) == [4, 6, 8, 10, 12]
    assert [row.max_itl_s for row in result.rows] == [1, 2, 2, 3, 4]
    assert result.swap_outs == 4


LARGE_THEN_SMALL: list[Request] = [
    (0.0, 50, 5, LATE_S, LATE_S),
    (0.0, 80, 3, LATE_S, LATE_S),
    (0.0, 5, 3, LATE_S, LATE_S),
]


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    # 100 KV tokens, ready at 1, 2, 3. r1 (81) does not fit beside r0 (52), and r2 waits behind it until r0 ends at 5.
    result = run(LARGE_THEN_SMALL, strategy("fcfs"), [ONE_SECOND], [decode(1.0, 0.0, 0.0, kv=100)])

    assert last_tokens(result) == [5, 7, 7]


def test_slack_admits_the_shortest_context_first() -> None:
    # As above, but at 3 r2 (context 6) comes first and fits: 4, 5.
    how = strategy("fcfs", decode="slack")

    result = run(LARGE_THEN_SMALL, how, [ONE_SECOND], [decode(1.0, 0.0, 0.0, kv=100)])

    assert last_tokens(result) == [5, 7, 5]


FOUR_AT_ONCE: list[Request] = [
    (0.0, 10, 3, LATE_S, 4.0),
    (0.0, 30, 3, LATE_S, 4.0),
    (0.0, 20, 3, LATE_S, 4.0),
    (0.0, 20, 3, LATE_S, 4.0),
    (0.0, 5, 3, LATE_S, 4.0),
]
"""Dealt to four instances of 1 s: r0 to r3 are ready at 1, r4 at 2."""


def test_slack_steps_the_shortest_contexts_that_fit_the_limit() -> None:
    # A step of B takes 1 + B; the limit is 0.75 * 4 = 3, so two run. 1: r0 (11), r2 (21, before r3 by id): 1-4.
    # 4: r4 (6), r0 (12): 4-7, r0 done. 7: r4 (7), r3 (21): 7-10, r4 done. 10: r2, r3 (22 each): 10-13, both done.
    # 13: r1 alone: 15, 17. Skips: 2 at 1; 3 at 4; 2 at 7; 1 at 10.
    how = strategy("fcfs", placement="round-robin", decode="slack", h=0.75)

    result = run(FOUR_AT_ONCE, how, [ONE_SECOND] * 4, [decode(1.0, 1.0, 0.0)])

    assert last_tokens(result) == [7, 17, 13, 13, 10]
    assert [row.max_itl_s for row in result.rows] == [3, 14, 9, 9, 5]
    assert result.skipped == 8


def test_slack_ignores_max_batch_and_keeps_batch_limit() -> None:
    # max_batch 1 and batch_limit 2; all fit one step of 2 s: r0, r2 1-3-5; r4, r3 5-7-9; r1 9-11-13.
    how = strategy("fcfs", placement="round-robin", decode="slack", h=0.75)

    result = run(FOUR_AT_ONCE, how, [ONE_SECOND] * 4, [decode(2.0, 0.0, 0.0, max_batch=1, limit=2)])

    assert last_tokens(result) == [5, 13, 5, 9, 9]


def test_capped_admits_while_the_step_stays_within_the_tightest_target() -> None:
    # A step of B takes 1 + B. Target 3: two run, in ready order: r0, r1 1-4-7, then r2, r3 7-10-13. r4's target of 1 no
    # step can keep: it enters once the instance is empty, 13-15-17.
    requests = [(*request[:4], 3.0) for request in FOUR_AT_ONCE[:4]] + [(*FOUR_AT_ONCE[4][:4], 1.0)]
    how = strategy("fcfs", placement="round-robin", decode="capped")

    result = run(requests, how, [ONE_SECOND] * 4, [decode(1.0, 1.0, 0.0)])

    assert last_tokens(result) == [7, 7, 13, 13, 17]


def test_continuous_fills_the_batch_up_to_its_cap_in_ready_order() -> None:
    # max_batch 2, 2 s a step: r0, r1 1-3-5; r2, r3 5-7-9; r4 9-11-13.
    how = strategy("fcfs", placement="round-robin")

    result = run(FOUR_AT_ONCE, how, [ONE_SECOND] * 4, [decode(2.0, 0.0, 0.0, max_batch=2)])

    assert last_tokens(result) == [5, 5, 9, 9, 13]


def test_the_first_token_may_come_from_the_first_decode_step() -> None:
    # Prefill 0-1 and 1-2, transfer 0.5. A step alone takes 1 + 0.5 + context / 8. r0 has a context of 7 + 1 before its
    # first token: 1.5-4, and, as no later token is out, before its second. r1 (one token) is ready at 2.5 and joins at
    # 4 with context 16: 1 + 1 + (8 + 16) / 8 = 5, so that step ends at 9 for both.
    transfer = {"bytes_per_token": 0, "bytes_per_s": 1.0, "latency_s": 0.5}
    requests = [(0.0, 7, 2, LATE_S, LATE_S), (0.0, 15, 1, LATE_S, LATE_S)]

    result = run(requests, strategy("fcfs"), [ONE_SECOND], [decode(1.0, 0.5, 0.125)], "decode", transfer)

    assert result.rows == [
        (0, 0, 0.0, 4.0, 1.5, 9.0, 5.0, "finished"),
        (0, 0, 1.0, 9.0, 2.5, 9.0, None, "finished"),
    ]


def test_ids_are_ranks_by_arrival_and_ties_keep_the_order_of_the_list() -> None:
    requests = [(5.0, 1, 1, LATE_S, LATE_S), (0.0, 2, 1, LATE_S, LATE_S), (0.0, 3, 1, LATE_S, LATE_S)]

    result = run(requests, strategy("fcfs"), [prefill(0.0, 1.0, 0.0, None)])

    assert steps_of(result, "prefill-0") == [(0.0, 2.0, (0,)), (2.0, 5.0, (1,)), (5.0, 6.0, (2,))]


# -- the cases show what they are there for ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {case.name: simulate(case.requests, case.fleet, case.strategy) for case in CASES}


def test_every_case_has_its_own_name_and_ends_with_every_request_finished(results: dict[str, Result]) -> None:
    assert len(results) == len(CASES)
    assert all(150 <= len(result.rows) <= 400 for result in results.values())
    assert {row.status for result in results.values() for row in result.rows} == {"finished"}


def test_kv_pressure_swaps_requests_out_under_every_decode_rule(results: dict[str, Result]) -> None:
    for rule in ("continuous", "capped", "slack"):
        assert results[f"kv-pressure-{rule}-short-grid"].swap_outs > 20


def test_slack_leaves_residents_out_of_steps(results: dict[str, Result]) -> None:
    assert all(results[case.name].skipped > 100 for case in CASES if case.name.startswith("skipped-steps"))


def test_with_preempt_prompts_are_interrupted_and_without_it_never(results: dict[str, Result]) -> None:
    interrupted = {case.name for case in CASES if _interruptions(results[case.name]) > 0}

    assert {case.name for case in CASES if case.name in interrupted and not case.strategy["preempt"]} == set()
    assert len(interrupted) > 20


def test_lost_requests_are_many_where_the_options_are_compared(results: dict[str, Result]) -> None:
    for case in CASES:
        if case.name.endswith("-grid") and case.strategy["lost_last"] and case.name.startswith("edf"):
            assert _late(case, results[case.name]) > 30


def test_grid_cases_have_many_events_at_one_instant(results: dict[str, Result]) -> None:
    for name in ("no-transfer-time-edf-grid", "no-transfer-time-fcfs-grid", "no-transfer-time-capped-grid"):
        steps = results[name].steps
        ends = [step.end_s for step in steps if step.instance.startswith("prefill")]
        decode_ends = {step.end_s for step in steps if step.instance.startswith("decode")}

        assert len(ends) - len(set(ends)) > 100
        assert len(decode_ends & set(ends)) > 50


def _interruptions(result: Result) -> int:
    """How often a prefill instance turned to another request before the one it ran was done."""
    turns = 0
    for instance in {step.instance for step in result.steps if step.instance.startswith("prefill")}:
        ran = [step.request_ids[0] for step in result.steps if step.instance == instance]
        runs = 1 + sum(before != after for before, after in pairwise(ran))
        turns += runs - len(set(ran))
    return turns


def _late(case: Case, result: Result) -> int:
    """Requests whose first token missed its target."""
    return sum(
        row.first_token_s is None or row.first_token_s - request[0] > request[3]
        for row, request in zip(result.rows, case.requests, strict=True)
    )
