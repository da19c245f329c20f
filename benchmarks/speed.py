"""Decision time against queue length, and simulated requests per second.

    [KAIROS_DATA=...] python benchmarks/speed.py

A decision of `on-time` through the Decider, guards included, beside its floor in the same run: Moore-Hodgson with a
heap on plain tuples kept sorted. The simulator runs an hour of mooncake_conversation with `on-time` and `envelope`,
decode steps included (a synthetic hour like it without KAIROS_DATA). Writes results/speed.json.
"""

import heapq
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import meta

from kairos.adapters.simulator.fleets import load_fleet
from kairos.adapters.simulator.run import Knobs, simulate
from kairos.adapters.simulator.scenario import Scenario, fleet_of, workload_of
from kairos.adapters.traces.generate import generate
from kairos.adapters.traces.kairos_csv import write_trace
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import PrefillInstance, Waiting
from kairos.scheduler_core.policy import Peer
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.strategy import parse_strategy

REPEATS = 300
STRATEGY = "on-time+late+headroom+envelope"


def waiting(n: int, seed: int = 0) -> list[Waiting]:
    """n requests that can all still be on time alone, half of them not together."""
    rng = np.random.default_rng(seed)
    work_s = rng.lognormal(np.log(0.05), 1.0, n)
    deadline_s = work_s + rng.uniform(0.0, float(work_s.sum()), n)
    return [
        Waiting(i, i * 1e-3 - n * 1e-3, 1000, 2.0, float(d), float(p), float(p))
        for i, (p, d) in enumerate(zip(work_s, deadline_s, strict=True))
    ]


def floor_of(requests: list[Waiting]) -> Callable[[], object]:
    """Moore-Hodgson on tuples already sorted by deadline: no decision can be made for less in Python."""
    ordered = sorted((w.deadline_s, w.prefill_s) for w in requests)

    def decide() -> float:
        busy_s, kept = 0.0, list[float]()
        for deadline_s, work_s in ordered:
            busy_s += work_s
            if busy_s <= deadline_s:
                heapq.heappush(kept, -work_s)
            else:
                busy_s += heapq.heappushpop(kept, -work_s)
        return busy_s

    return decide


def decision_of(requests: list[Waiting], instances: int) -> Callable[[], object]:
    """A whole decision of one of several instances that share the queue."""
    decider = Decider(parse_strategy(STRATEGY), deferred_share=0.05)
    settings = load_fleet("b300")
    instance = PrefillInstance("prefill-0", step_times_of(settings, "qwen3-32b-b300-tp4"), 8192, 8)
    queue = WaitingQueue(requests)
    lane = decider.prefill_lane(instance, decider.prefill_rule(), queue)
    peers = [Peer(f"prefill-{n}", 0.01 * n) for n in range(1, instances)]
    return lambda: decider.next_prefill(lane, 0.0, peers)


def timed_us(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and p99 microseconds of a call."""
    taken = []
    for _ in range(repeats):
        started_ns = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - started_ns) / 1e3)
    return {"p50": float(np.median(taken)), "p99": float(np.percentile(taken, 99))}


def decisions() -> list[dict[str, object]]:
    """Decision time by queue length, and for 32 instances."""
    rows: list[dict[str, object]] = []
    for n, instances, goal in ((100, 1, ""), (1_000, 1, "0.4 ms"), (10_000, 1, "6 ms"), (1_000, 32, "p99 < 1 ms")):
        requests = waiting(n)
        repeats = max(30, REPEATS * 1000 // max(n, 1000))
        floor, ours = timed_us(floor_of(requests), repeats), timed_us(decision_of(requests, instances), repeats)
        ratio = ours["p50"] / floor["p50"]
        rows.append({"waiting": n, "instances": instances, "us": ours, "floor_us": floor, "over_floor": ratio})
        print(
            f"{n:6,} waiting, {instances:2} instances: {ours['p50']:8.0f} us (p99 {ours['p99']:.0f}), "
            f"{ratio:.2f} x the floor (goal 2 for one instance; {goal})"
        )
    return rows


def simulated_hour() -> dict[str, object]:
    """Processor seconds of an hour of mooncake_conversation on four prefill and four decode instances."""
    data = os.environ.get("KAIROS_DATA")
    path = Path(data, "traces", "mooncake_conversation.csv.gz") if data else Path("synthetic_mooncake.csv.gz")
    if not data:
        write_trace(generate("mooncake_conversation", 2652.0, seed=0), path)
    scenario = Scenario(path, "b300", "fixed:2/tpot:0.05")
    workload, fleet = workload_of(scenario), fleet_of("b300")
    started_s = time.process_time()
    run = simulate(workload, fleet, parse_strategy(STRATEGY), Knobs())
    seconds = time.process_time() - started_s
    if not data:
        path.unlink()
    print(
        f"{len(workload):,} requests, {len(run.gaps.itl_s):,} tokens: {seconds:.1f} s of one core (goal 20 s), "
        f"{len(workload) / seconds:,.0f} requests/s"
    )
    return {"trace": workload.trace, "requests": len(workload), "tokens": len(run.gaps.itl_s), "cpu_s": seconds}


def main() -> None:
    """Measure, print, write."""
    results = {"meta": meta("python benchmarks/speed.py"), "decisions": decisions(), "simulator": simulated_hour()}
    path = Path(__file__).parent / "results" / "speed.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
