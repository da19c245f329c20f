"""TPOT attainment of `envelope` against `continuous` and `slack`, one target and mixed ones.

    KAIROS_DATA=... python benchmarks/decode.py [--duration 900] [--max-batch 256]

The four reference traces on both fitted profiles, one decode instance, prefill never the bottleneck (32 instances), at
0.8, 0.95 and 1.1 of the SLO capacity. Targets: 2.5 x T(1, median context), or 1.5, 2.5 and 5 x it for a third each.
`continuous` holds at most --max-batch requests (vLLM's default of 256), the others what KV takes. No noise, so one
seed. Writes results/decode.json and prints a table.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from record import meta

TRACES = ("mooncake_conversation", "azure2023_code", "azure2023_conv", "servegen_r1_resampled")
FLEETS = ("b300", "h100")
KINDS = {"one": (2.5,), "mixed": (1.5, 2.5, 5.0)}
LOADS = (0.8, 0.95, 1.1)
POLICIES = ("continuous", "slack(h=0.9)", "envelope")
GOALS = {
    "over continuous": {0.8: 5.0, 0.95: 25.0, 1.1: 45.0},
    "over slack(h=0.9)": {"one": 3.0, "mixed": 8.0},
}


def run_cell(trace: str, fleet: str, kind: str, load: float, duration_s: float) -> dict[str, Any]:
    """TPOT attainment of each policy in one cell."""
    from kairos.adapters.simulator.run import Knobs, simulate
    from kairos.adapters.simulator.scenario import Scenario, fleet_of, workload_of
    from kairos.adapters.traces import read_trace
    from kairos.scheduler_core.strategy import parse_strategy

    path = Path(os.environ["KAIROS_DATA"], "traces", f"{trace}.csv.gz")
    recorded = read_trace(path)
    instances = fleet_of(fleet)
    median_context = int(np.median(recorded.prompt_tokens + recorded.output_tokens / 2))
    alone_s = instances.decode[0].instance.step_times.decode_step_s(1, median_context)
    target = "fixed:1000/tpot:" + ",".join(f"{factor * alone_s:.6f}" for factor in KINDS[kind])
    jitter_s = 3.0 if trace.startswith("mooncake") else 0.0
    scenario = Scenario(path, fleet, target, decode_load=load, jitter_s=jitter_s, limit_s=duration_s)
    attained = {}
    for policy in POLICIES:
        strategy = parse_strategy(f"fcfs+round-robin+least-requests+{policy}")
        run = simulate(workload_of(scenario), instances, strategy, Knobs(deferred_share=0.0))
        assert not run.fallbacks, run.fallbacks
        attained[policy] = 100 * float(run.requests.tpot_met.mean())
    return {"trace": trace, "fleet": fleet, "kind": kind, "load": load, "attained": attained}


def main() -> None:
    """Run all cells, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=900.0)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    arguments = parser.parse_args()
    os.environ["KAIROS_FLEET__PREFILL__0__COUNT"] = "32"
    os.environ["KAIROS_FLEET__DECODE__0__COUNT"] = "1"
    os.environ["KAIROS_FLEET__DECODE__0__MAX_BATCH"] = str(arguments.max_batch)
    tasks = [joblib.delayed(run_cell)(*cell, arguments.duration) for cell in product(TRACES, FLEETS, KINDS, LOADS)]
    cells: list[dict[str, Any]] = []
    print(f"{'trace':22} fleet targets load  " + "  ".join(f"{p:>12}" for p in POLICIES))
    for cell in joblib.Parallel(n_jobs=arguments.jobs, return_as="generator")(tasks):
        cells.append(cell)
        figures = "  ".join(f"{cell['attained'][p]:12.1f}" for p in POLICIES)
        print(f"{cell['trace']:22} {cell['fleet']:5} {cell['kind']:7} {cell['load']:<5} {figures}", flush=True)
    means: list[dict[str, Any]] = []
    for kind, load in product(KINDS, LOADS):
        those = [c["attained"] for c in cells if c["kind"] == kind and c["load"] == load]
        gain = {p: float(np.mean([a["envelope"] - a[p] for a in those])) for p in POLICIES[:2]}
        means.append({"kind": kind, "load": load, "envelope_over_pp": gain})
        print(
            f"{kind} at {load}: envelope over continuous {gain['continuous']:+.1f} "
            f"(goal {GOALS['over continuous'][load]:+.0f}), over slack(h=0.9) {gain['slack(h=0.9)']:+.1f} "  # type: ignore[index]
            f"(goal {GOALS['over slack(h=0.9)'][kind]:+.0f})"  # type: ignore[index]
        )
    arguments.out.write_text(
        json.dumps(
            {
                "meta": meta(
                    f"python benchmarks/decode.py --duration {arguments.duration:g} --max-batch {arguments.max_batch}",
                    [0],
                ),
                "cells": cells,
                "means": means,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
