"""What a simulated fleet does beyond the rules that the reference covers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from builders import step_times
from simulations import fleet, workload

from kairos.adapters.simulator.fleet import SimulatedFleet
from kairos.adapters.simulator.run import Knobs, Run, simulate
from kairos.adapters.simulator.tables import STATUSES
from kairos.adapters.simulator.workload import build_workload
from kairos.adapters.traces import Trace
from kairos.scheduler_core.config import Handover, KvTransfer, SloClass, SloSettings
from kairos.scheduler_core.domain import Control
from kairos.scheduler_core.policy import PrefillPlacementView
from kairos.scheduler_core.strategy import parse_strategy

GUARD_OFF = Knobs(deferred_share=0.0)


class LateForLong:
    """A third party's placement: long prompts wait in the shared queue, short ones take turns by length."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The shared queue for prompts over 1,000 tokens."""
        if view.request.prompt_tokens > 1_000:
            return None
        return view.instances[view.request.prompt_tokens % len(view.instances)].instance.instance_id


def run(
    at_work: SimulatedFleet,
    arrival_s: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int] | None = None,
    strategy: str = "fcfs+late+least-requests+continuous",
    knobs: Knobs = GUARD_OFF,
) -> Run:
    return simulate(workload(arrival_s, prompts, outputs), at_work, parse_strategy(strategy), knobs)


def test_a_placement_may_leave_some_requests_in_the_shared_queue_and_bind_others() -> None:
    strategy = parse_strategy("fcfs+simulator.test_run:LateForLong+least-requests+continuous")
    done = simulate(workload([0.0, 0.0, 0.0], [4_000, 1_000, 3_000]), fleet(2), strategy, GUARD_OFF)

    # 1,000 is bound to instance 0, which 4,000 took from the shared queue before it; 3,000 goes to instance 1
    assert done.fallbacks == {}
    assert done.requests.prefill_instance.tolist() == [0, 0, 1]
    assert done.requests.first_token_s.tolist() == pytest.approx([4.0, 5.0, 3.0])


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    def first_tokens(seed: int) -> list[float]:
        knobs = Knobs(seed=seed, noise=0.2, predictor_error=0.2)
        done = run(fleet(2), [0.0, 0.1, 0.2, 0.3], [1_000, 2_000, 500, 700], knobs=knobs)
        return done.requests.first_token_s.tolist()

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)


def test_prefill_noise_is_the_same_for_every_strategy() -> None:
    knobs = Knobs(seed=3, noise=0.2)
    alone = [
        run(fleet(4), [0.0, 10.0, 20.0], [1_000, 2_000, 500], strategy=strategy, knobs=knobs).requests.ttft_s
        for strategy in ("fcfs+late+least-requests+continuous", "on-time+round-robin+headroom+envelope")
    ]

    np.testing.assert_allclose(alone[0], alone[1])


def test_prefill_alone_gives_the_ttft_of_a_whole_run() -> None:
    arrivals, prompts, outputs = [0.0, 0.1, 0.2, 0.3], [1_000, 2_000, 500, 700], [5, 1, 9, 2]
    whole = run(fleet(2), arrivals, prompts, outputs)
    prefill = run(fleet(2), arrivals, prompts, outputs, knobs=replace(GUARD_OFF, stages="prefill"))

    np.testing.assert_array_equal(whole.requests.ttft_s, prefill.requests.ttft_s)


def test_a_contended_link_moves_one_prompt_after_the_other() -> None:
    # 1,000 tokens x 1 byte at 1,000 bytes a second: 1 s each; both prompts end at 2 s in one step
    link = KvTransfer(bytes_per_token=1, bytes_per_s=1_000, contention=True)
    at_work = replace(fleet(1, chunk_tokens=4_000, max_requests_per_step=2), kv_transfer=link)
    done = run(at_work, [0.0, 0.0], [1_000, 1_000], [2, 2], "kairos-paper+late+least-requests+continuous")

    assert done.requests.first_token_s.tolist() == pytest.approx([2.0, 2.0])
    assert done.requests.decode_ready_s.tolist() == pytest.approx([3.0, 4.0])


def test_prefill_waits_while_it_holds_more_kv_than_allowed() -> None:
    link = KvTransfer(bytes_per_token=1, bytes_per_s=1_000)
    at_work = replace(fleet(1), kv_transfer=link)
    held = replace(at_work, prefill=[replace(at_work.prefill[0], kv_held_tokens=1_000)])
    done = run(held, [0.0, 0.0], [1_000, 1_000], [2, 2])

    # the second prompt starts when decode has taken the first one's KV, a second after its first token
    assert done.requests.prefill_start_s.tolist() == pytest.approx([0.0, 2.0])


def test_decode_is_chosen_at_dispatch_where_the_engine_needs_both_legs_at_once() -> None:
    # the first request is still in prefill when the second is dispatched: it counts as load on decode-0
    at_work = replace(fleet(2, 2), handover=Handover(place_decode="at_dispatch"))
    done = run(at_work, [0.0, 0.5], [2_000, 1_000], [3, 3], "fcfs+round-robin+least-requests+continuous")

    assert done.requests.decode_instance.tolist() == [0, 1]


def test_a_prefix_that_was_computed_before_is_not_computed_again() -> None:
    at_work = fleet(1)
    cached = replace(at_work, prefill=[replace(at_work.prefill[0], cache_tokens=10_000)])
    submitted = replace(
        workload([0.0, 10.0, 20.0], [2_000, 3_000, 2_000]),
        block_ids=[(1, 2), (1, 2, 3), (1, 2)],
        block_tokens=1_000,
    )
    done = simulate(submitted, cached, parse_strategy("fcfs+late+least-requests+continuous"), GUARD_OFF)

    # the last one is cached whole, but one token is always computed
    assert done.requests.cached_tokens.tolist() == [0, 2_000, 1_999]
    assert done.requests.ttft_s.tolist() == pytest.approx([2.0, 1.0, 0.001])


def test_the_cache_forgets_the_least_recently_used_blocks_first() -> None:
    at_work = fleet(1)
    cached = replace(at_work, prefill=[replace(at_work.prefill[0], cache_tokens=3_000)])
    submitted = replace(
        workload([0.0, 10.0, 20.0, 30.0], [2_000, 2_000, 2_000, 2_000]),
        block_ids=[(1, 2), (3, 4), (1, 2), (3, 4)],
        block_tokens=1_000,
    )
    done = simulate(submitted, cached, parse_strategy("fcfs+late+least-requests+continuous"), GUARD_OFF)

    # three blocks fit: block 2 leaves for 3 and 4; then 4 leaves when 2 is computed again
    assert done.requests.cached_tokens.tolist() == [0, 0, 1_000, 1_000]


def test_a_gateway_cannot_preempt_a_running_prompt() -> None:
    def second_token_s(control: Control) -> float:
        at_work = fleet(1, chunk_tokens=1_000, control=control)
        rule = "sjf(preempt=true)+late+least-requests+continuous"
        return float(run(at_work, [0.0, 0.5], [4_000, 1_000], strategy=rule).requests.first_token_s[1])

    assert second_token_s(Control.ENGINE) == pytest.approx(2.0)
    assert second_token_s(Control.GATEWAY) == pytest.approx(5.0)


def test_a_run_says_what_the_fleet_does_not_let_the_strategy_do() -> None:
    at_work = fleet(1, control=Control.GATEWAY)
    notes = run(at_work, [0.0], [1_000], strategy="on-time+late+headroom+envelope").notes

    assert len(notes) == 3
    assert all("is not applied" in note or "not applied" in note for note in notes)


def test_a_model_that_nobody_serves_is_rejected_and_counted() -> None:
    submitted = replace(workload([0.0, 1.0], [1_000, 1_000]), model=["a-model", "another"])
    done = simulate(submitted, fleet(), parse_strategy("fcfs+late+least-requests+continuous"), GUARD_OFF)

    assert [STATUSES[code] for code in done.requests.status] == ["finished", "rejected"]
    assert "1 requests rejected: no_instance_serves_model" in done.notes


def test_requests_longer_than_any_kv_capacity_run_alone_and_are_counted() -> None:
    done = run(fleet(kv_tokens=1_500), [0.0, 0.1], [1_000, 2_000], [5, 5])

    assert [STATUSES[code] for code in done.requests.status] == ["finished", "finished"]
    assert any(note.startswith("1 requests are longer than any decode instance's KV capacity") for note in done.notes)


def test_the_share_guard_lets_a_lost_request_run_before_newer_ones() -> None:
    # short prompts arrive as fast as they are served; the long one is lost from the start
    arrivals = [0.0, *(0.001 + n for n in range(60))]
    prompts = [20_000, *([1_000] * 60)]
    rule = "edf(lost_last=true,preempt=true)+late+least-requests+continuous"

    def long_start_s(share: float) -> float:
        at_work = fleet(1, chunk_tokens=1_000)
        done = run(at_work, arrivals, prompts, strategy=rule, knobs=Knobs(deferred_share=share))
        return float(done.requests.first_token_s[0])

    assert long_start_s(0.5) < long_start_s(0.0)


def test_late_leaves_a_request_to_the_instance_that_has_its_prefix_for_as_long_as_that_saves() -> None:
    # instance 0 computes blocks 1 and 2; at 3 s the same prompt comes again while instance 0 is busy until 4 s: waiting
    # 1 s saves nearly 2. Busy until 7 s it would not be worth it
    def second_instance(other_tokens: int) -> int:
        at_work = fleet(2)
        caching = replace(at_work, prefill=[replace(unit, cache_tokens=10_000) for unit in at_work.prefill])
        submitted = replace(
            workload([0.0, 2.0, 3.0], [2_000, other_tokens, 2_000], ttft_target_s=100.0),
            block_ids=[(1, 2), tuple(range(10, 10 + other_tokens // 1_000)), (1, 2)],
            block_tokens=1_000,
        )
        done = simulate(submitted, caching, parse_strategy("fcfs+late+least-requests+continuous"), GUARD_OFF)
        assert done.requests.prefill_instance.tolist()[:2] == [0, 0]
        return int(done.requests.prefill_instance[2])

    assert [second_instance(2_000), second_instance(5_000)] == [0, 1]


def test_a_class_that_the_configuration_does_not_have_counts_as_default_and_is_named() -> None:
    slo = SloSettings(classes={"default": SloClass(ttft_s=3.0, tpot_s=0.1)})
    trace = Trace("t", np.array([0.0]), np.array([10]), np.array([2]), slo_class=["gold"])
    submitted = build_workload(trace, slo, step_times())

    assert submitted.ttft_target_s.tolist() == [3.0]
    assert submitted.notes == ["1 requests of class 'gold', which slo.classes does not have, count as 'default'"]
