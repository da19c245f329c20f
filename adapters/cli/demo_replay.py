"""The part of `kairos demo` that needs no fleet: data, step times learned from it, strategies compared by replay."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml

from kairos.adapters.cli.terminal import progress

if TYPE_CHECKING:
    from kairos.adapters.simulator.scenario import Scenario
    from kairos.adapters.simulator.tables import Workload
    from kairos.adapters.traces import Trace

STRATEGIES = ("engine-default", "tuned", "paper", "kairos")
LOADS = (0.7, 0.9, 1.1)
SEEDS = 2
TTFT_S, TPOT_S = 2.0, 0.02
NOISE = 0.05
TICK_S = 3.0
"""Arrivals of the mooncake traces are recorded on ticks of so many seconds; jitter spreads them."""
MOST_REQUESTS, MOST_OUTPUT_TOKENS = 9_000, 3_200_000
"""As much of a trace as 2 cores simulate in about two minutes."""
ASKED = 6
"""Requests in the snapshot that /schedule is asked about."""
START_LIMIT_S = 60.0

PROFILE = "qwen3-32b-b300-tp4"
MODEL = "Qwen/Qwen3-32B"
CONFIGURATION = """\
# Written by `kairos demo`. docs/configuration.md says what each setting means.
profiles:
  {profile}:
    {{gpu: B300-SXM6, model: {name}, precision: bf16, tp: 4, engine: vllm-0.20.1,
     step_times: {{model: {model}}}}}
fleet:
  prefill: [{{count: 1, profile: {profile}, chunk_tokens: 8192}}]
  decode: [{{count: 1, profile: {profile}, max_batch: 64, kv_tokens: 1200000}}]
  kv_transfer: {{bytes_per_token: 262144, bytes_per_s: 25.0e9, latency_s: 0.002}}
slo: {{classes: {{default: {{ttft_s: {ttft_s:g}, tpot_s: {tpot_s:g}}}}}}}
"""


@dataclass(frozen=True, slots=True)
class Data:
    """What the demo learns from and replays."""

    trace: Path
    telemetry: Path
    synthetic: bool


def demo_data(out: Path) -> Data:
    """Real data where KAIROS_DATA has it, else synthetic data, written into a folder of `out`."""
    from kairos.adapters.traces import write_trace
    from kairos.adapters.traces.generate import generate
    from kairos.adapters.traces.synthetic_telemetry import write_telemetry

    if folder := os.environ.get("KAIROS_DATA"):
        telemetry = Path(folder, "telemetry")
        traces = sorted(Path(folder, "traces").glob("*.csv*"))
        if traces and telemetry.is_dir():
            trace = next((path for path in traces if path.name.startswith("mooncake_conversation")), traces[0])
            return Data(trace, telemetry, synthetic=False)
        typer.echo(f"note: KAIROS_DATA is {folder}, which has no traces/*.csv.gz and telemetry/", err=True)
    typer.echo("note: no real data (KAIROS_DATA is the folder to look in), so all data is SYNTHETIC", err=True)
    trace = out / "synthetic_mooncake_conversation.csv.gz"
    telemetry = out / "synthetic_telemetry"
    write_trace(generate("mooncake_conversation", duration_s=2_700, seed=0), trace)
    write_telemetry(telemetry, seed=0)
    return Data(trace, telemetry, synthetic=True)


def learn(telemetry: Path, model: Path) -> list[dict[str, Any]]:
    """Train and save; per kind of step the held-back errors, the median over profiles."""
    from statistics import median

    from kairos.adapters.telemetry_files import read_telemetry
    from kairos.predictors.artifact import save
    from kairos.predictors.training import by_profile, train

    steps = read_telemetry([telemetry]).steps
    learned = []
    with progress("training", len(by_profile(steps))) as advance:
        for entry in train(steps):
            learned.append(entry)
            advance(len(learned))
    save(learned, model)
    rows = []
    for kind in ("prefill", "decode", "mixed"):
        known = [m.held_back for e in learned for k, m in e.models.items() if k == kind]
        errors = [(h.median_ape, h.prior_median_ape) for h in known if h.median_ape is not None]
        if errors:
            ours, prior = (median(values) for values in zip(*errors, strict=True))
            rows.append({"kind": kind, "profiles": len(errors), "median_ape": ours, "prior_median_ape": prior})
    return rows


def scenarios_of(path: Path, fleet: str) -> tuple[list["Scenario"], str]:
    """The trace at each load, and what of it is replayed, in words."""
    from kairos.adapters.simulator.scenario import Scenario
    from kairos.adapters.traces import read_trace

    trace = read_trace(path)
    limit_s = limit_s_of(trace)
    jitter_s = TICK_S if "mooncake_conversation" in trace.name else 0.0
    target = f"fixed:{TTFT_S:g}/tpot:{TPOT_S:g}"
    span_s = float(trace.arrival_s.max() - trace.arrival_s.min())
    replayed = f"all {len(trace):,} requests ({span_s:,.0f} s)"
    if limit_s is not None:
        replayed = f"the first {limit_s:,.0f} s of {span_s:,.0f} s"
    if jitter_s:
        replayed += f", arrivals spread over their {jitter_s:g} s ticks"
    return [Scenario(path, fleet, target, load, jitter_s=jitter_s, limit_s=limit_s) for load in LOADS], replayed


def limit_s_of(trace: "Trace") -> float | None:
    """How many seconds of the trace can be simulated in a demo; None: all of it."""
    import numpy as np

    order = np.argsort(trace.arrival_s, kind="stable")
    tokens = np.cumsum(trace.output_tokens[order])
    count = min(MOST_REQUESTS, int(np.searchsorted(tokens, MOST_OUTPUT_TOKENS)))
    if count >= len(order):
        return None
    return float(trace.arrival_s[order[count]] - trace.arrival_s[order[0]])


def beginning(scenario: "Scenario", seconds: float, most: int) -> "Workload":
    """The first so many seconds of a scenario, and at most so many requests, as of second 0."""
    from kairos.adapters.simulator.scenario import workload_of
    from kairos.adapters.simulator.workload import first_requests

    workload = workload_of(scenario)
    return first_requests(workload, min(most, int((workload.arrival_s - workload.arrival_s[0] < seconds).sum())))


def compared(scenarios: list["Scenario"], out: Path, command: str) -> dict[str, Any]:
    """results.json of every strategy in every scenario."""
    from kairos.adapters.simulator.compare import Plan, compare
    from kairos.adapters.simulator.run import Knobs

    plan = Plan(scenarios, STRATEGIES, range(SEEDS), Knobs(noise=NOISE))
    began_s = time.monotonic()
    runs = len(plan.runs())
    typer.echo(f"{runs} runs, one to two minutes ...", err=True)
    with progress(f"{runs} runs", runs) as advance:
        results = compare(plan, out, command, -1, advance)
    typer.echo(f"{runs} runs in {time.monotonic() - began_s:.0f} s", err=True)
    return results


def replayed_metrics(workload: "Workload", fleet: Path, strategy: str) -> dict[str, float]:
    """What the simulator says of a workload on a fleet: the attainments."""
    from kairos.adapters.simulator.evidence import run_metrics
    from kairos.adapters.simulator.run import Knobs, simulate
    from kairos.adapters.simulator.scenario import fleet_of, settings_of, strategy_of

    settings = settings_of(str(fleet))
    chosen = strategy_of(settings, strategy)
    run = simulate(workload, fleet_of(str(fleet)), chosen, Knobs(deferred_share=settings.guards.deferred_share))
    metrics = run_metrics(run.requests)
    return {name: getattr(metrics, name) for name in ("ttft_attainment", "tpot_attainment", "slo_attainment")}


def write_configuration(path: Path, model: Path) -> dict[str, Any]:
    """Write the kairos.yaml of a fleet with the step times of a model; what is in it."""
    path.write_text(
        CONFIGURATION.format(profile=PROFILE, name=MODEL, model=json.dumps(str(model)), ttft_s=TTFT_S, tpot_s=TPOT_S)
    )
    written: dict[str, Any] = yaml.safe_load(path.read_text())
    return written


def snapshot_of(workload: "Workload", profile: str, chunk_tokens: int, kv_tokens: int) -> dict[str, Any]:
    """A few arrivals in a row with the most work per second, as the last of them arrives, and an idle fleet."""
    import numpy as np

    arrival_s = workload.arrival_s
    asked = min(ASKED, len(workload))
    span_s = arrival_s[asked - 1 :] - arrival_s[: len(arrival_s) - asked + 1]
    tokens = np.convolve(workload.prompt_tokens, np.ones(asked), "valid")
    first = int(np.argmax(tokens / np.maximum(span_s, 1.0)))
    rows = range(first, first + asked)
    return {
        "now_s": float(arrival_s[rows[-1]]),
        "instances": [
            {"instance_id": "prefill-0", "role": "prefill", "profile": profile, "chunk_tokens": chunk_tokens},
            {"instance_id": "decode-0", "role": "decode", "profile": profile, "kv_tokens": kv_tokens},
        ],
        "waiting": [
            {
                "request_id": workload.request_id[row],
                "arrival_s": float(arrival_s[row]),
                "prompt_tokens": int(workload.prompt_tokens[row]),
            }
            for row in rows
        ],
    }
