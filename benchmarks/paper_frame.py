"""The paper's frame: `kairos-paper` against `fcfs` as the arrival rate rises.

    python benchmarks/paper_frame.py

1,000 long-tailed requests (lognormal lengths, the longest under 119,000 tokens, Poisson arrivals; synthetic) on one
prefill instance of the fleet `paper`, TTFT target 8 s. The rate is swept so that `fcfs` falls through 100, 76, 60 and
15 %; published for the paper's rule there: 100, 100, 77 and 16 % (arXiv 2605.02329v1). Writes results/paper_frame.json.
"""

import json
from pathlib import Path

import numpy as np
from record import meta

PUBLISHED = {100.0: 100.0, 76.0: 100.0, 60.0: 77.0, 15.0: 16.0}
POLICIES = ("fcfs", "kairos-paper", "fcfs(lost_last=true)", "on-time")
SEEDS = range(5)
REQUESTS = 1000
LONGEST_TOKENS = 118_999


def attained(load: float, seed: int, policies: tuple[str, ...] = POLICIES) -> dict[str, float]:
    """TTFT attainment of each policy on one drawn workload, percent."""
    from kairos.adapters.simulator.run import Knobs, simulate
    from kairos.adapters.simulator.scenario import fleet_of, settings_of
    from kairos.adapters.simulator.workload import at_load, build_workload, parse_target
    from kairos.adapters.traces import Trace
    from kairos.scheduler_core.strategy import parse_strategy

    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(4000), 1.2, REQUESTS), 32, LONGEST_TOKENS).astype(np.int64)
    arrival_s = np.cumsum(rng.exponential(1.0, REQUESTS))
    trace = Trace("synthetic_long_tail", arrival_s, prompts, np.ones(REQUESTS, dtype=np.int64), synthetic=True)
    fleet = fleet_of("paper")
    times = fleet.prefill[0].instance.step_times
    workload = build_workload(trace, settings_of("paper").slo, times, parse_target("fixed:8"))
    workload = at_load(workload, load, times, 1)
    knobs = Knobs(stages="prefill", deferred_share=0.0)
    return {
        policy: 100
        * float(
            simulate(
                workload, fleet, parse_strategy(f"{policy}+round-robin+least-requests+continuous"), knobs
            ).requests.ttft_met.mean()
        )
        for policy in policies
    }


def load_where_fcfs_attains(percent: float, seed: int) -> float:
    """The load at which arrival order serves so many requests on time, by bisection."""
    low, high = 0.2, 6.0
    for _ in range(12):
        middle = (low + high) / 2
        if attained(middle, seed, ("fcfs",))["fcfs"] >= percent:
            low = middle
        else:
            high = middle
    return low


def main() -> None:
    """Sweep, print the two curves, write the results."""
    rows = []
    print("fcfs   " + "  ".join(f"{policy:>20}" for policy in POLICIES[1:]) + "   published for kairos-paper")
    for percent, published in PUBLISHED.items():
        loads = [load_where_fcfs_attains(min(percent, 99.9), seed) for seed in SEEDS]
        runs = [attained(load, seed) for load, seed in zip(loads, SEEDS, strict=True)]
        mean = {policy: float(np.mean([run[policy] for run in runs])) for policy in POLICIES}
        rows.append({"load": float(np.mean(loads)), "attained": mean, "published": published})
        print(
            f"{mean['fcfs']:5.1f}  " + "  ".join(f"{mean[policy]:20.1f}" for policy in POLICIES[1:]) + f"   {published}"
        )
    path = Path(__file__).parent / "results" / "paper_frame.json"
    path.write_text(
        json.dumps({"meta": meta("python benchmarks/paper_frame.py", SEEDS), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
