"""The champion replayed on a block's arrivals."""

import time

import numpy as np
from simulations import fleet, workload

from kairos.adapters.simulator.fleet import build_fleet
from kairos.adapters.simulator.fleets import load_fleet
from kairos.adapters.simulator.replay import SimulatedReplay
from kairos.adapters.simulator.run import simulate
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.replay import Arrivals, Replay
from kairos.scheduler_core.slo import NO_TARGET_S
from kairos.scheduler_core.strategy import parse_strategy

KAIROS = parse_strategy("on-time+late+headroom+envelope")


def arrivals(n: int, span_s: float, seed: int = 0) -> Arrivals:
    """Requests of a block."""
    rng = np.random.default_rng(seed)
    return Arrivals(
        np.sort(rng.uniform(0.0, span_s, n)),
        rng.integers(10, 4_000, n),
        rng.integers(1, 100, n),
        np.full(n, 4.0),
        np.full(n, 0.05),
    )


def test_a_replay_is_a_simulation_without_noise() -> None:
    block, at_work = arrivals(200, 100.0), fleet(prefill=2, decode=2, chunk_tokens=1_000)
    replay: Replay = SimulatedReplay(at_work, deferred_share=0.05)
    columns = (block.arrival_s, block.prompt_tokens, block.output_tokens, block.ttft_target_s, block.tpot_target_s)
    simulated = simulate(workload(*(column.tolist() for column in columns)), at_work, KAIROS).requests

    replayed = replay(KAIROS, block)

    assert np.array_equal(replayed.met, simulated.slo_met)
    assert np.array_equal(replayed.wait_s, simulated.prefill_start_s - block.arrival_s)
    assert 0 < replayed.met.sum() < len(block)


def test_waits_of_requests_that_are_never_begun_are_infinite() -> None:
    refuses = parse_strategy("fcfs+late+least-requests+continuous+on-arrival")
    hopeless = Arrivals(
        np.zeros(2), np.array([1_000, 9_000]), np.array([1, 1]), np.full(2, 2.0), np.full(2, NO_TARGET_S)
    )

    replayed = SimulatedReplay(fleet(), deferred_share=0.0)(refuses, hopeless)

    assert replayed.met.tolist() == [True, False]
    assert replayed.wait_s.tolist() == [0.0, np.inf]


def test_no_arrivals_are_replayed_to_nothing() -> None:
    assert SimulatedReplay(fleet(), deferred_share=0.05)(KAIROS, arrivals(0, 1.0)).met.tolist() == []


def test_a_replay_costs_a_small_part_of_the_time_it_replays() -> None:
    settings = load_fleet("b300")
    replay = SimulatedReplay(build_fleet(settings, step_times_of), settings.guards.deferred_share)
    began_s = time.process_time()

    replay(KAIROS, arrivals(600, 300.0))

    assert time.process_time() - began_s < 300.0 / 50
