"""Another strategy in the middle of a run: it finds everything that waits, as it waits."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from simulations import fleet, workload

from kairos.adapters.simulator.run import Knobs, Run, simulate
from kairos.scheduler_core.strategy import parse_strategy

GUARD_OFF = Knobs(deferred_share=0.0)
FCFS = parse_strategy("fcfs+late+least-requests+continuous")


def same(one: Run, other: Run) -> bool:
    """Whether every request had the same life."""
    columns = [field.name for field in fields(one.requests) if field.name != "workload"]
    return all(
        np.array_equal(getattr(one.requests, name), getattr(other.requests, name), equal_nan=name.endswith("_s"))
        for name in columns
    )


@pytest.mark.parametrize(
    "text",
    [
        "fcfs+late+least-requests+continuous",
        "edf(lost_last=true,preempt=true)+least-work+headroom+slack(h=0.9)",
        "on-time+late+headroom+envelope",
    ],
)
@settings(max_examples=40, deadline=None)
@given(
    gaps_s=st.lists(st.floats(0.0, 2.0), min_size=5, max_size=30),
    switch_s=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_a_switch_to_the_same_policies_under_another_name_changes_nothing(
    text: str, gaps_s: list[float], switch_s: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = len(gaps_s)
    prompts, outputs = rng.integers(1, 4_000, n).tolist(), rng.integers(1, 40, n).tolist()
    submitted = workload(np.cumsum(gaps_s).tolist(), prompts, outputs, ttft_target_s=3.0)
    at_work = fleet(prefill=2, decode=2, chunk_tokens=1_000, max_requests_per_step=4)
    strategy = parse_strategy(text)
    renamed = [(at_s, replace(strategy, name=f"again at {at_s}")) for at_s in sorted(switch_s)]

    assert same(
        simulate(submitted, at_work, strategy, Knobs(noise=0.1)),
        simulate(submitted, at_work, strategy, Knobs(noise=0.1), renamed),
    )


def test_a_switch_to_the_strategy_that_decides_already_keeps_its_memory() -> None:
    # By turns: the third request goes to the first instance again, whatever was said in between.
    submitted = workload([0.0, 1.0, 2.0], [100, 100, 100])
    by_turns = parse_strategy("fcfs+round-robin+least-requests+continuous")

    run = simulate(submitted, fleet(prefill=2), by_turns, GUARD_OFF, [(0.5, by_turns), (1.5, by_turns)])

    assert run.requests.prefill_instance.tolist() == [0, 1, 0]


def test_the_new_strategy_orders_what_waits_by_its_own_rule_and_waits_count_from_the_true_arrival() -> None:
    # 5 s of work from 0; 3 s wait since 1 and 1 s since 2. Shortest first from 3 on: at 5 the last, at 6 the second.
    submitted = workload([0.0, 1.0, 2.0], [5_000, 3_000, 1_000])
    sjf = parse_strategy("sjf+late+least-requests+continuous")

    run = simulate(submitted, fleet(), FCFS, GUARD_OFF, [(3.0, sjf)])

    assert run.requests.prefill_start_s.tolist() == [0.0, 6.0, 5.0]
    assert run.requests.ttft_s.tolist() == [5.0, 8.0, 4.0]


def test_requests_that_waited_for_one_instance_are_placed_anew_where_the_placement_is_another() -> None:
    # By turns the third waits for the first instance until 10; the second is free from 1 on.
    submitted = workload([0.0, 0.0, 0.5], [10_000, 1_000, 1_000])
    by_turns = parse_strategy("fcfs+round-robin+least-requests+continuous")

    run = simulate(submitted, fleet(prefill=2), by_turns, GUARD_OFF, [(2.0, FCFS)])

    assert run.requests.prefill_instance.tolist() == [0, 1, 1]
    assert run.requests.prefill_start_s.tolist() == [0.0, 0.0, 2.0]


def test_a_begun_prompt_stays_where_its_kv_is() -> None:
    # Chunks of 1,000: at 2.5 the first prompt has begun on instance 0, whatever the new placement would say.
    submitted = workload([0.0, 0.0], [6_000, 6_000])
    by_turns = parse_strategy("fcfs+round-robin+least-requests+continuous")

    run = simulate(submitted, fleet(prefill=2, chunk_tokens=1_000), by_turns, GUARD_OFF, [(2.5, FCFS)])

    assert run.requests.first_token_s.tolist() == [6.0, 6.0]
    assert [step.instance for step in run.steps if step.request_ids == [0]] == [0] * 6


def test_decode_follows_the_new_strategy_from_its_next_step_on() -> None:
    submitted = workload([0.0, 0.0], [100, 100], [60, 60], tpot_target_s=[0.0115, 1.0])
    slack = parse_strategy("fcfs+late+least-requests+slack(h=0.9)")
    logged = Knobs(deferred_share=0.0, keep_steps=True)

    together = simulate(submitted, fleet(), FCFS, logged).steps
    switched = simulate(submitted, fleet(), FCFS, logged, [(0.4, slack)]).steps

    assert [s for s in switched if s.start_s < 0.4] == [s for s in together if s.start_s < 0.4]
    assert {len(s.request_ids) for s in together if 0.4 <= s.start_s < 0.6} == {2}
    assert {len(s.request_ids) for s in switched if 0.4 <= s.start_s < 0.6} == {1}
