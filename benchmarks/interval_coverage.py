"""How often a 95 % interval holds the truth, by number of time blocks and correlation of neighbouring blocks.

    python benchmarks/interval_coverage.py

Blocks are made up: a wave (AR(1), sd 1) moves the share in time of each, three seeds draw their own outcomes from it.
`even`: 200 requests a block, share 0.8 +- 0.07. `skewed`: requests are Poisson with a log-normal mean, and the share
falls with the load. Writes benchmarks/results/interval_coverage.json and prints it as a table.
"""

import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
from scipy.signal import lfilter
from scipy.special import expit

from kairos.adapters.simulator.intervals import BlockSampling
from kairos.scheduler_core.slo import FloatArray

OUT = Path(__file__).parent / "results" / "interval_coverage.json"
TRIALS = 1000
SEEDS = 3
BLOCKS = (10, 14, 20, 44, 100)
CORRELATIONS = (0.0, 0.3, 0.6)
LONG = 200_000
"""Blocks from which the truth is taken."""


def main() -> None:
    """Measure all, write and print."""
    rows = [
        {"load": load, "blocks": blocks, "correlation": rho, "coverage": coverage(load, blocks, rho)}
        for load in ("even", "skewed")
        for blocks in BLOCKS
        for rho in CORRELATIONS
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    made = {"commit": commit, "machine": machine, "command": "python benchmarks/interval_coverage.py", "seeds": [0]}
    OUT.write_text(json.dumps({**made, "trials": TRIALS, "rows": rows}, indent=1) + "\n")
    print(f"share of {TRIALS} intervals that hold the truth, nominal 0.95\n{'load':>7} {'blocks':>7}", end="")
    print("".join(f"   r = {rho}" for rho in CORRELATIONS))
    for first in range(0, len(rows), len(CORRELATIONS)):
        some = rows[first : first + len(CORRELATIONS)]
        print(f"{some[0]['load']:>7} {some[0]['blocks']:>7}" + "".join(f"{row['coverage']:>10.3f}" for row in some))


def coverage(load: str, blocks: int, rho: float) -> float:
    """The share of trials whose interval holds the share in time of a very long run."""
    rng = np.random.default_rng([0, blocks, round(10 * rho), load == "even"])
    counted, share = traffic(rng, load, LONG, rho)
    truth = float((counted * share).sum() / counted.sum())
    holds = 0
    for _ in range(TRIALS):
        counted, share = traffic(rng, load, blocks, rho)
        met = rng.binomial(np.tile(counted.astype(np.int64), (SEEDS, 1)), share).astype(np.float64)
        interval = BlockSampling(SEEDS, blocks).ratio_interval(met, np.tile(counted, (SEEDS, 1)))
        assert interval is not None
        holds += interval.low <= truth <= interval.high
    return holds / TRIALS


def traffic(rng: np.random.Generator, load: str, blocks: int, rho: float) -> tuple[FloatArray, FloatArray]:
    """Requests of each block and the chance that one is in time, both (blocks,)."""
    shocks = rng.normal(size=blocks) * np.where(np.arange(blocks) == 0, 1.0, np.sqrt(1 - rho**2))
    wave = np.asarray(lfilter([1.0], [1.0, -rho], shocks), dtype=np.float64)
    if load == "even":
        return np.full(blocks, 200.0), np.clip(0.8 + 0.07 * wave, 0.0, 1.0)
    return rng.poisson(200 * np.exp(0.5 * wave)).astype(np.float64), np.asarray(expit(1.5 - wave), dtype=np.float64)


if __name__ == "__main__":
    main()
