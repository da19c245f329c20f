"""What predictor errors and the share guard cost `on-time`, in points of TTFT attainment.

    KAIROS_DATA=... python benchmarks/robustness.py

The four reference traces, 2 s, one instance, loads 0.9 and 1.2, prefill alone. Errors are lognormal per request, 3
seeds. Writes results/robustness.json.
"""

import json
import os
from itertools import product
from pathlib import Path

import joblib
import numpy as np
from attainment import FLEETS, OURS, scenario_of
from record import meta

LOADS = (0.9, 1.2)
ERRORS = {0.1: 0.5, 0.3: 3.3, 0.6: 10.0}
"""Goal in points by sigma."""
SHARES = (0.0, 0.02, 0.05, 0.1)
SEEDS = range(3)


def attained(trace: str, load: float, error: float, share: float) -> float:
    """TTFT attainment in percent, mean over the seeds."""
    from kairos.adapters.simulator.run import Knobs, simulate
    from kairos.adapters.simulator.scenario import fleet_of, workload_of
    from kairos.scheduler_core.strategy import parse_strategy

    workload = workload_of(scenario_of(trace, "fixed:2", load))
    strategy = parse_strategy(f"{OURS}+late+least-requests+continuous")
    seeds = SEEDS if error else SEEDS[:1]
    runs = [
        simulate(
            workload, fleet_of(FLEETS[trace]), strategy, Knobs(seed, 0.0, error, deferred_share=share, stages="prefill")
        )
        for seed in seeds
    ]
    return 100 * float(np.mean([run.requests.ttft_met.mean() for run in runs]))


def main() -> None:
    """Run, print, write."""
    os.environ["KAIROS_FLEET__PREFILL__0__COUNT"] = "1"
    settings = [(error, 0.0) for error in (0.0, *ERRORS)] + [(0.0, share) for share in SHARES[1:]]
    cells = list(product(FLEETS, LOADS, settings))
    found = joblib.Parallel(n_jobs=-1)(joblib.delayed(attained)(t, load, *setting) for t, load, setting in cells)
    by_cell = dict(zip(cells, found, strict=True))
    rows = []
    for error, share in settings[1:]:
        costs = [by_cell[t, load, (0.0, 0.0)] - by_cell[t, load, (error, share)] for t, load in product(FLEETS, LOADS)]
        row = {"error_sigma": error, "deferred_share": share, "cost_pp": float(np.mean(costs)), "worst_pp": max(costs)}
        rows.append(row)
        goal = f" (goal at most {ERRORS[error]} in the mean)" if error else ""
        what = f"predictor error {error}" if error else f"deferred share {share}"
        print(f"{what}: costs {row['cost_pp']:.2f} points in the mean, {row['worst_pp']:.2f} at worst{goal}")
    path = Path(__file__).parent / "results" / "robustness.json"
    path.write_text(json.dumps({"meta": meta("python benchmarks/robustness.py", SEEDS), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
