"""How often an experiment between equal strategies ends in a verdict, and how soon one between unequal ones does.

    python benchmarks/experiments_validity.py

Switchbacks of 120 pairs on synthetic blocks, judged after every pair by the same `judge` that the service calls.
Offered load is log-AR(1), so bursts last for hours; the replay of the champion knows most of what the load does.
Printed beside: what the planner promised, and a t-test at each look on the same pairs. Writes
results/experiments_validity.json.
"""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
from scipy.signal import lfilter
from scipy.special import expit

from kairos.scheduler_core.service.experiments.design import Lengths, Pair, Plan, Side, Stage, coin
from kairos.scheduler_core.service.experiments.evidence import SignFlips, adjust, sigma_of
from kairos.scheduler_core.service.experiments.planner import FEWEST_PAIRS_TO_STOP, n50
from kairos.scheduler_core.service.experiments.sequence import covariate, differences, weights
from kairos.scheduler_core.service.experiments.verdict import judge
from kairos.scheduler_core.slo import FloatArray

SEED = 0
PAIRS = 120
HISTORY = 1000
REQUESTS = 600.0
CORRELATION = 0.9
OUT = Path(__file__).parent / "results" / "experiments_validity.json"

Effect = Callable[[FloatArray], FloatArray]
"""The challenger's gain in attainment at each load."""


def main() -> None:
    """Measure all, write and print."""
    began_s = time.monotonic()
    rng = np.random.default_rng(SEED)
    cells = [cell(rng, "equal", constant(0), cuped, runs=1000) for cuped in (True, False)]
    cells += [
        cell(rng, f"{points:+d} points", constant(points), cuped, runs=100)
        for points in (2, 5, 10, -5, -10)
        for cuped in (True, False)
    ]
    cells += [cell(rng, "+2 points, -18 in the busiest 10 % of blocks", busy_loses, cuped=True, runs=200)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    made = {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "command": "python benchmarks/experiments_validity.py",
        "seeds": [SEED],
        "pairs": PAIRS,
        "took_s": round(time.monotonic() - began_s),
    }
    OUT.write_text(json.dumps({**made, "cells": cells}, indent=1) + "\n")
    show(cells)


def show(cells: list[dict[str, object]]) -> None:
    """The cells as a table; shares in percent, pairs as numbers, `-` where fewer than half got there."""
    columns = [key for key in cells[0] if key != "effect"]
    print(f"{'effect':44}" + "".join(f"{name:>{len(name) + 2}}" for name in columns))
    for row in cells:
        print(
            f"{row['effect']:44}"
            + "".join(f"{row[name] if row[name] is not None else '-':>{len(name) + 2}}" for name in columns)
        )


def constant(points: int) -> Effect:
    """The same gain at any load."""
    return lambda load: np.full_like(load, points / 100)


def busy_loses(load: FloatArray) -> FloatArray:
    """Helps nine tenths of the time and loses as much in the rest."""
    return np.where(load > LOAD_BOUNDS[2], -0.18, 0.02)


def cell(rng: np.random.Generator, effect: str, gain: Effect, cuped: bool, runs: int) -> dict[str, object]:
    """What became of `runs` experiments with this effect."""
    sigma = sigma_from_history(rng, cuped)
    found = [experiment(rng, gain, sigma, cuped, run) for run in range(runs)]
    stops = [word for word, _, _, _ in found]
    first = [crossed for _, crossed, _, _ in found]
    quiet, busy = (abs(float(size)) for size in gain(np.array([0.0, 9.0])))
    return {
        "effect": effect,
        "cuped": cuped,
        "runs": runs,
        "sigma": round(sigma, 3),
        "better %": percent(word == "better" for word in stops),
        "worse %": percent(word == "worse" for word in stops),
        "crossed %": percent(crossed is not None for crossed in first),
        "crossed in 60 %": percent(crossed is not None and crossed <= 60 for crossed in first),
        "pairs to cross": median(first),
        "planned": round(n50(quiet, sigma, PLAN.alpha.better)) if quiet == busy > 0.0 else None,
        "pairs to verdict": median([pairs for _, _, pairs, _ in found]),
        "t-test at each look %": percent(alarm for _, _, _, alarm in found),
    }


def experiment(
    rng: np.random.Generator, gain: Effect, sigma: float, cuped: bool, run: int
) -> tuple[str, int | None, int | None, bool]:
    """(last word, pairs until a boundary is crossed, pairs until it stops better or worse, whether a t-test alarms).

    The full judge is asked where a boundary is crossed: elsewhere its word can be neither.
    """
    plan = msgspec.structs.replace(PLAN, id=f"exp_{run}", sigma=sigma)
    pairs = observe(rng, plan, gain, PAIRS, cuped)
    d = adjusted(plan, pairs)
    evidence = SignFlips(sigma)
    over = np.maximum(evidence.log_e_better(d), evidence.log_e_harm(d)) >= math.log(1 / plan.alpha.better)
    looks = [n for n in range(FEWEST_PAIRS_TO_STOP, PAIRS + 1) if over[n - 1]]
    n = np.arange(2, PAIRS + 1)
    mean = np.cumsum(d)[1:] / n
    sd = np.sqrt(np.maximum(np.cumsum(d * d)[1:] / n - mean**2, 1e-12) * n / (n - 1))
    alarm = bool((np.abs(mean / sd * np.sqrt(n))[FEWEST_PAIRS_TO_STOP - 2 :] > 1.96).any())
    for look in looks:
        word = judge(plan, pairs[:look]).verdict
        if word in ("better", "worse"):
            return word, looks[0], look, alarm
    return "none", looks[0] if looks else None, None, alarm


def observe(rng: np.random.Generator, plan: Plan, gain: Effect, pairs: int, cuped: bool) -> list[Pair]:
    """Pairs of neighbouring blocks; the arm changes attainment, never the load, the noise or the replay."""
    load = offered_load(rng, 2 * pairs)
    arrivals = rng.poisson(REQUESTS * load)
    champion = attainment(load) + 0.04 * rng.standard_t(5, 2 * pairs)
    replayed = np.clip(champion + 0.03 * rng.standard_normal(2 * pairs), 0.0, 1.0)
    first_is_b = np.array([coin(plan, i) > 0 for i in range(pairs)])
    is_b = np.stack([first_is_b, ~first_is_b], axis=1).ravel()
    met = rng.binomial(arrivals, np.clip(champion + is_b * gain(load), 0.0, 1.0))
    sides = [
        Side(counted=int(arrivals[k]), met=int(met[k]), replayed=float(replayed[k]) if cuped else None)
        for k in range(2 * pairs)
    ]
    return [
        Pair(i=i, first=sides[2 * i], second=sides[2 * i + 1], load=float(load[2 * i]), share=0.5) for i in range(pairs)
    ]


def offered_load(rng: np.random.Generator, blocks: int) -> FloatArray:
    """(blocks,) around 1, log-AR(1)."""
    shocks = rng.standard_normal(blocks) * np.where(np.arange(blocks) == 0, 1.0, np.sqrt(1 - CORRELATION**2))
    return np.exp(0.3 * np.asarray(lfilter([1.0], [1.0, -CORRELATION], shocks), dtype=np.float64))


def attainment(load: FloatArray) -> FloatArray:
    """The champion's: 85 % when quiet, falling steeply with load."""
    return np.asarray(0.85 * expit(4.0 * (1.6 - load)), dtype=np.float64) + 0.02


def adjusted(plan: Plan, pairs: list[Pair]) -> FloatArray:
    """(n,) what `judge` tests."""
    w = weights(plan, pairs)
    return adjust(differences(plan, pairs, w), covariate(plan, pairs, w))


def sigma_from_history(rng: np.random.Generator, cuped: bool) -> float:
    """As a plan takes it: from the champion alone."""
    history = observe(rng, PLAN, constant(0), HISTORY, cuped)
    w = weights(PLAN, history)
    return sigma_of(differences(PLAN, history, w), covariate(PLAN, history, w))


def percent(hits: Iterable[bool]) -> float:
    """Share of true ones in percent."""
    return round(100 * float(np.mean(list(hits))), 1)


def median(pairs: list[int | None]) -> float | None:
    """Over all runs, those that never got there last; None if that is the middle one."""
    middle = float(np.median([math.inf if n is None else n for n in pairs]))
    return middle if math.isfinite(middle) else None


LOAD_BOUNDS = tuple(np.quantile(offered_load(np.random.default_rng(SEED), 100_000), (0.5, 0.75, 0.9)).tolist())
PLAN = Plan(
    id="history",
    design="switchback",
    champion="a@1",
    challenger="b@1",
    lengths=Lengths(block_s=300.0, burn_s=60.0, tail_s=8.0, settle_s=20.0, drain_p90_s=60.0),
    sigma=1.0,
    requests_per_pair=2 * REQUESTS,
    load_bounds=LOAD_BOUNDS,
    seed=SEED,
    max_hours=20.0,
    fixed_at="2026-08-01T05:00:00Z",
    stages=(Stage(0.5, None),),
)

if __name__ == "__main__":
    main()
