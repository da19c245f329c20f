"""Blocks of live experiments by simulation: what each arm attains in each block of a long, bursty stretch of traffic.

A stretch re-joins windows of a trace under a load factor that drifts for hours. One prefill instance, the slower the
shorter a trace's prompts are, so that a block has some 400 requests; first tokens within 8 s; noise 0.1 on every
prefill. Decode is left out: it would cost twenty times the rest. Four runs give each block under both arms after both
arms: all champion, all challenger, and by turns beginning with either.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
from msgspec import structs
from numpy.typing import NDArray
from scipy.signal import lfilter

from kairos.adapters.simulator.fleet import SimulatedFleet
from kairos.adapters.simulator.run import Knobs, Simulation, simulate
from kairos.adapters.simulator.scenario import Scenario, fleet_of, workload_of
from kairos.adapters.simulator.tables import Workload
from kairos.adapters.simulator.workload import isolated_prefill_s
from kairos.scheduler_core.domain import Line, LinearStepTimes
from kairos.scheduler_core.policy import PrefillPlacementView, PrefillView
from kairos.scheduler_core.service.experiments.design import Lengths, drain_p90_s, lengths_for
from kairos.scheduler_core.service.experiments.verdict import BlockHealth, Limits, absolute_breaches
from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.strategy import Strategy, parse_strategy

WINDOW_S = 300.0
TARGET_S = 8.0
LENGTHS = Lengths(300.0, 60.0, TARGET_S, 60.0, 60.0)
"""Of blocks whose length no plan has chosen: the shortest."""
NOISE = 0.1
SPREAD = 0.15
"""Of the load factor, in logs; it keeps 95 % of itself from one window of 300 s to the next."""
SLOWER = {
    "mooncake_conversation": 1.0,
    "azure2023_code": 5.0,
    "azure2023_conv": 8.0,
    "servegen_r1_resampled": 4.0,
}
"""Factor on the step times of the shipped fleet `paper`, by trace."""
CHAMPION = "fcfs+late+least-requests+continuous"

memory = joblib.Memory(Path(tempfile.gettempdir()) / "kairos-experiment-blocks", verbose=0)


class Lenient:
    """In arrival order, but for a share of decisions that pass over whoever can no longer be on time.

    At 0 it is `fcfs`, at 1 it is `fcfs(lost_last=true)`: the share tunes how much better it is.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.owed = 0.0

    def order(self, view: PrefillView) -> Sequence[object]:
        """The one request that runs next, then the others."""
        self.owed += self.share
        if self.owed >= 1.0 and view.by_deadline:
            self.owed -= 1.0
            first = view.by_deadline[0]
        else:
            first = view.waiting[0]
        rest = view.waiting if view.wanted > 1 else ()
        return [first.request_id, *(w.request_id for w in rest if w is not first)]


class Raises:
    """A strategy with a bug."""

    def order(self, view: PrefillView) -> Sequence[object]:
        """No order at all."""
        raise ZeroDivisionError


class Starves:
    """A strategy that leaves all instances but one idle."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The first, however long its queue."""
        return view.instances[0].instance.instance_id


def lenient(share: float) -> Strategy:
    """The tunable challenger."""
    return parse_strategy(f"experiment_blocks:Lenient(share={share:.4f})+late+least-requests+continuous")


@dataclass(frozen=True)
class Blocks:
    """B blocks of one stretch; arrays (B,) unless said otherwise."""

    counted: NDArray[np.int64]
    met: NDArray[np.int64]
    """(2, 2, B): of those counted, by the arm before and the block's own; 1 = challenger."""
    lengths: Lengths
    replayed: FloatArray
    """Attainment of the champion, replayed without noise on its pair and the block before."""
    load: FloatArray
    """Offered prefill seconds a second."""
    drain_p90_s: float


def fleet_for(trace: str, instances: int = 1) -> SimulatedFleet:
    """Equal prefill instances."""
    unit = fleet_of("paper").prefill[0]
    line = Line(*(SLOWER[trace] * x for x in unit.instance.step_times.prefill_line))
    times = LinearStepTimes(line, unit.instance.step_times.decode_line)
    units = [
        replace(unit, instance=structs.replace(unit.instance, instance_id=f"prefill-{n}", step_times=times))
        for n in range(instances)
    ]
    return replace(fleet_of("paper"), prefill=units)


def stretch(trace: str, load: float, duration_s: float, seed: int, instances: int = 1) -> Workload:
    """So many seconds of traffic: windows of the trace from anywhere in it, one after the other."""
    path = Path(os.environ["KAIROS_DATA"], "traces", f"{trace}.csv.gz")
    jitter_s = 3.0 if trace == "mooncake_conversation" else 0.0  # its timestamps are quantised to 3 s
    base = workload_of(
        Scenario(path, "paper", f"fixed:{TARGET_S:g}", load=load * instances / SLOWER[trace], jitter_s=jitter_s)
    )
    rng = np.random.default_rng([seed, round(100 * load)])
    windows = np.arange(math.ceil(duration_s / WINDOW_S) + 1)
    shocks = rng.standard_normal(len(windows)) * np.where(windows == 0, 1.0, np.sqrt(1 - 0.95**2))
    factors = np.exp(SPREAD * lfilter([1.0], [1.0, -0.95], shocks) - SPREAD**2 / 2)
    rows, at_s = [], []
    for window, factor in enumerate(factors):
        length_s = WINDOW_S * factor
        start_s = rng.uniform(base.arrival_s[0], base.arrival_s[-1] - length_s)
        inside = np.flatnonzero((base.arrival_s >= start_s) & (base.arrival_s < start_s + length_s))
        rows.append(inside)
        at_s.append((window - 1 / 3) * WINDOW_S + (base.arrival_s[inside] - start_s) / factor)
    row, arrival_s = np.concatenate(rows), np.concatenate(at_s)
    kept = (arrival_s >= 0) & (arrival_s < duration_s)
    return rows_of(base, row[kept], arrival_s[kept])


def rows_of(base: Workload, row: NDArray[np.int64], arrival_s: FloatArray) -> Workload:
    """Some requests of a workload, at other times."""
    n = len(row)
    return Workload(
        base.trace, range(n), arrival_s, base.prompt_tokens[row], base.output_tokens[row], base.ttft_target_s[row],
        base.tpot_target_s[row], ["default"] * n, [""] * n, [""] * n,
    )  # fmt: skip


def block_of(arrival_s: FloatArray, lengths: Lengths = LENGTHS) -> tuple[NDArray[np.int64], BoolArray]:
    """The block of each arrival, and whether it counts."""
    block = (arrival_s // lengths.block_s).astype(np.int64)
    within_s = arrival_s - block * lengths.block_s
    return block, (within_s >= lengths.burn_s) & (within_s < lengths.block_s - lengths.tail_s)


def by_block(workload: Workload, of_each: FloatArray | BoolArray, blocks: int, lengths: Lengths) -> NDArray[np.int64]:
    """Sum over the counted arrivals of each block, (blocks,)."""
    block, counted = block_of(workload.arrival_s, lengths)
    sums = np.bincount(block[counted], weights=of_each[counted].astype(np.float64), minlength=blocks)
    return sums.round().astype(np.int64)


@memory.cache
def ran(
    trace: str, load: float, blocks: int, seed: int, shares: tuple[float, ...], block_s: float = LENGTHS.block_s
) -> tuple[BoolArray, FloatArray]:
    """Which requests of a stretch met their target, and their first tokens, with these strategies by turns."""
    workload = stretch(trace, load, blocks * block_s, seed)
    turns = [(k * block_s, arm(shares[k % len(shares)])) for k in range(1, blocks)] if len(shares) > 1 else []
    knobs = Knobs(noise=NOISE, stages="prefill")
    requests = simulate(workload, fleet_for(trace), arm(shares[0]), knobs, turns).requests
    return requests.ttft_met, requests.first_token_s


def arm(share: float) -> Strategy:
    """By its share."""
    return lenient(share) if share else parse_strategy(CHAMPION)


@memory.cache
def replay_of(trace: str, load: float, blocks: int, seed: int, share: float, lengths: Lengths) -> FloatArray:
    """Attainment in each block of a strategy that is replayed without noise, (blocks,).

    As the service asks for it: a pair of blocks and the block before it, from an idle fleet.
    """
    workload, fleet = stretch(trace, load, blocks * lengths.block_s, seed), fleet_for(trace)
    block, counted = block_of(workload.arrival_s, lengths)
    attained = np.zeros(blocks)
    for first in range(0, blocks, 2):
        rows = np.flatnonzero((block >= first - 1) & (block <= first + 1))
        window = rows_of(workload, rows, workload.arrival_s[rows])
        met = simulate(window, fleet, arm(share), Knobs(stages="prefill")).requests.ttft_met
        for k in (first, first + 1):
            inside = counted[rows] & (block[rows] == k)
            attained[k] = met[inside].mean() if inside.any() else 0.0
    return attained


def drain_of(trace: str, load: float, blocks: int, seed: int, block_s: float = LENGTHS.block_s) -> float:
    """Of the champion."""
    met, first_token_s = ran(trace, load, blocks, seed, (0.0,), block_s)
    return drain_p90_s(stretch(trace, load, blocks * block_s, seed).arrival_s, first_token_s, ~met)


def planned_lengths(trace: str, load: float, blocks: int, seed: int) -> Lengths:
    """As a plan would fix them, which has seen so many of the shortest blocks."""
    return lengths_for(drain_of(trace, load, blocks, seed), TARGET_S, LENGTHS.settle_s - TARGET_S)


def blocks_of(
    trace: str, load: float, blocks: int, seed: int, champion: float, challenger: float, lengths: Lengths = LENGTHS
) -> Blocks:
    """What two strategies (by their shares) attain in each block, each after each."""
    block_s = lengths.block_s
    workload = stretch(trace, load, blocks * block_s, seed)
    pair = (champion, challenger)

    def sums(*shares: float) -> NDArray[np.int64]:
        return by_block(workload, ran(trace, load, blocks, seed, shares, block_s)[0], blocks, lengths)

    met = np.empty((2, 2, blocks), dtype=np.int64)
    for own in (0, 1):
        met[own, own] = sums(pair[own])
    if champion == challenger:
        met[:] = met[0, 0]
    else:
        champion_first, challenger_first = sums(champion, challenger), sums(challenger, champion)
        odd = np.arange(blocks) % 2 == 1
        met[0, 1] = np.where(odd, champion_first, challenger_first)
        met[1, 0] = np.where(odd, challenger_first, champion_first)
    times = fleet_for(trace).prefill[0].instance.step_times
    work_s = isolated_prefill_s(times, workload.prompt_tokens)
    block, _ = block_of(workload.arrival_s, lengths)
    return Blocks(
        counted=by_block(workload, np.ones(len(workload)), blocks, lengths),
        met=met,
        lengths=lengths,
        replayed=replay_of(trace, load, blocks, seed, champion, lengths),
        load=np.bincount(block, weights=work_s, minlength=blocks) / block_s,
        drain_p90_s=drain_of(trace, load, blocks, seed, block_s),
    )


def share_for(points: float, trace: str, load: float, blocks: int, seed: int, lengths: Lengths) -> float | None:
    """The share at which the challenger is so many points better than the champion; None where none is.

    Points as an experiment counts them: of pairs of blocks, weighted by their requests up to three times the mean.
    """
    shares = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    workload = stretch(trace, load, blocks * lengths.block_s, seed)
    counted = by_block(workload, np.ones(len(workload)), blocks, lengths)
    pairs = counted[0::2] + counted[1::2]
    weights = np.repeat(np.minimum(pairs / pairs.mean(), 3.0), 2)
    gains = np.empty(len(shares))
    for place, share in enumerate(shares):
        met = by_block(workload, ran(trace, load, blocks, seed, (share,), lengths.block_s)[0], blocks, lengths)
        gains[place] = 100 * np.average(met / np.maximum(counted, 1), weights=weights)
    gains = np.maximum.accumulate(gains) - gains[0]
    return float(np.interp(points, gains, shares)) if gains[-1] >= points else None


def guard_acts(challenger: str, trace: str, load: float, blocks: int, seed: int) -> list[str]:
    """The absolute guards that act in the block in which a strategy takes over, block by block; "" where none does.

    Four instances; the champion ran until then. What still waits at the block's end has waited so long.
    """
    fleet = fleet_for(trace, instances=4)
    workload = stretch(trace, load, blocks * LENGTHS.block_s, seed, instances=4)
    champion, knobs = parse_strategy(CHAMPION), Knobs(noise=NOISE, stages="prefill")
    alone = simulate(workload, fleet, champion, knobs).requests
    waited_s = alone.prefill_start_s - workload.arrival_s
    limits = Limits(
        error_rate_p999=0.0, decision_budget_us=1e6, ttft_target_s=TARGET_S, worst_wait_s=float(waited_s.max())
    )
    found = []
    for k in range(1, blocks):
        start_s, end_s = k * LENGTHS.block_s, (k + 1) * LENGTHS.block_s
        rows = np.flatnonzero((workload.arrival_s >= start_s - LENGTHS.block_s) & (workload.arrival_s < end_s))
        here = Simulation(rows_of(workload, rows, workload.arrival_s[rows]), fleet, champion, knobs)
        here.advance(start_s)
        here.switch(parse_strategy(challenger), start_s)
        decisions = len(here.decision_us)
        here.advance(end_s)
        begun_s = np.nan_to_num(np.array(here.outcome.prefill_start_s), nan=end_s)
        inside = here.workload.arrival_s >= start_s
        failures = here.decider.validity.fallbacks
        health = BlockHealth(
            requests=int(inside.sum()),
            errors=0,
            decisions=len(here.decision_us) - decisions,
            exceptions=sum(count for name, count in failures.items() if not name.endswith("PolicyError")),
            fallbacks=failures.total(),
            decision_p99_us=0.0,
            healthy=True,
            worst_wait_s=float((begun_s - here.workload.arrival_s)[inside].max()),
            replayed_worst_wait_s=float(waited_s[rows][inside].max()),
        )
        found.append("; ".join(breach.name for breach in absolute_breaches(health, limits)))
    return found
