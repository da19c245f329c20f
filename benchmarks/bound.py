"""How long the clairvoyant bound takes, against the goal of one second for 8,777 requests, with the LP beside it.

    python benchmarks/bound.py

Synthetic arrivals and work (log-normal, sigma 1.3) over the span of an hour's trace; medians of five runs. Writes
benchmarks/results/bound.json and prints it as a table.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from kairos.adapters.simulator.clairvoyant import PREFILL_SLOTS, Demand, lp_bound, ttft_bound
from kairos.scheduler_core.slo import FloatArray

OUT = Path(__file__).parent / "results" / "bound.json"
GOAL_S = 1.0
SEED = 0
SPAN_S = 2650.0
RUNS = 5
SIZES = (8777, 16_635)
LOADS = (0.9, 1.5)


def main() -> None:
    """Measure all, write and print."""
    rows = [row for n in SIZES for load in LOADS for row in measured(n, load)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    made = {"commit": commit, "machine": machine, "command": "python benchmarks/bound.py", "seeds": [SEED]}
    OUT.write_text(json.dumps({**made, "goal_s": GOAL_S, "rows": rows}, indent=1) + "\n")
    print(f"greedy: median seconds of {RUNS} runs, goal {GOAL_S} s; LP with {PREFILL_SLOTS} slots: one run")
    print(f"{'requests':>8} {'load':>5} {'targets':>8} {'greedy s':>9} {'bound %':>8} {'LP s':>6} {'LP bound %':>10}")
    for row in rows:
        print(
            f"{row['requests']:>8} {row['load']:>5} {row['targets']:>8} {row['greedy_s']:>9.3f} "
            f"{100 * row['bound']:>8.2f} {row['lp_s']:>6.2f} {100 * row['lp_bound']:>10.2f}"
        )


def measured(n: int, load: float) -> list[dict[str, float | str]]:
    """One row for each family of targets."""
    rng = np.random.default_rng(SEED)
    arrival_s = np.sort(rng.uniform(0.0, SPAN_S, n))
    work_s = rng.lognormal(0.0, 1.3, n)
    work_s *= load * SPAN_S / work_s.sum()
    families: dict[str, FloatArray] = {
        "fixed": np.full(n, 2.0),
        "classes": rng.choice([2.0, 15.0], n),
        "scaled": np.maximum(1.0, 5.0 * work_s),
    }
    rows: list[dict[str, float | str]] = []
    for targets, target_s in families.items():
        possible = work_s <= target_s
        arrives_s, asks_s, due_s = arrival_s[possible], work_s[possible], (arrival_s + target_s)[possible]
        greedy = [timed(partial(ttft_bound, arrives_s, asks_s, due_s, instances=1)) for _ in range(RUNS)]
        lp_s, lp = timed(partial(lp_bound, [Demand(arrives_s, due_s, asks_s, per_s=1, slots=PREFILL_SLOTS)]))
        rows.append(
            {
                "requests": n,
                "load": load,
                "targets": targets,
                "greedy_s": statistics.median(seconds for seconds, _ in greedy),
                "bound": greedy[0][1] / n,
                "lp_s": lp_s,
                "lp_bound": lp / n,
            }
        )
    return rows


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and what came out."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
