"""`kairos demo`: from telemetry and a trace to strategies compared and a decision over HTTP, on this machine alone."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kairos.adapters.cli.terminal import percent, progress
from kairos.scheduler_core.errors import KairosError

if TYPE_CHECKING:
    from kairos.adapters.simulator.scenario import Scenario
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
CONFIGURATION = """\
# Written by `kairos demo`. docs/configuration.md says what each setting means.
profiles:
  {profile}:
    {{gpu: B300-SXM6, model: Qwen/Qwen3-32B, precision: bf16, tp: 4, engine: vllm-0.20.1,
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


def register(app: typer.Typer) -> None:
    """Add `demo`."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("demo-out"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Train on telemetry, compare four strategies on a trace at three loads, and ask POST /schedule once.

    Takes real data from the folder that KAIROS_DATA names (laid out like the data pack: traces/, telemetry/), and
    otherwise generates a synthetic trace and telemetry. Takes two to four minutes on 2 cores.

    Example: kairos demo --out demo-out
    """
    say = typer.echo if not as_json else _nothing
    out.mkdir(parents=True, exist_ok=True)
    data = _data(out)
    mark = " (SYNTHETIC)" if data.synthetic else ""

    say(f"1. Train on the step times in {data.telemetry}{mark}")
    model = out / "model.kairos"
    learned = _train(data.telemetry, model)
    for row in learned:
        say(
            f"   {row['kind']:8} median error {percent(row['median_ape'], 2)} on held-back operating points,"
            f" physical prior {percent(row['prior_median_ape'], 2)} (median of {row['profiles']} profiles)"
        )

    configuration = out / "kairos.yaml"
    configuration.write_text(
        CONFIGURATION.format(profile=PROFILE, model=json.dumps(str(model)), ttft_s=TTFT_S, tpot_s=TPOT_S)
    )
    say(f"\n2. A fleet of one prefill and one decode instance with these step times: {configuration}")

    scenarios, replayed = _scenarios(data.trace, str(configuration))
    say(f"\n3. Compare on {data.trace}{mark}: {replayed}; {SEEDS} seeds, noise {NOISE:g}\n")
    results = _compare(scenarios, out, f"kairos demo --out {out}{mark}")
    if not as_json:
        _print_comparison(results)

    asked = _snapshot(scenarios[1])
    with _service(configuration, out / "serve.log") as url:
        say(f"\n4. Ask POST {url}/schedule who runs next of the {len(asked['waiting'])} busiest arrivals in a row")
        answer = _post(f"{url}/schedule", asked)
    prompts = {request["request_id"]: request["prompt_tokens"] for request in asked["waiting"]}
    for row in answer["prefill"]:
        say(
            f"   {row['order'] + 1}. request {row['request_id']:>5}: {prompts[row['request_id']]:>7,} tokens,"
            f" predicted TTFT {row['predicted_ttft_s']:5.2f} s, {'in time' if row['on_time'] else 'late'}:"
            f" {row['reason']['code']}"
        )

    report = out / "report.html"
    say(f"\n5. Open {report} in a browser; every number is in {out / 'results.json'}")
    if as_json:
        files = {"model": model, "configuration": configuration, "results": out / "results.json", "report": report}
        summary = {
            "synthetic": data.synthetic,
            "trace": str(data.trace),
            "telemetry": str(data.telemetry),
            "training": learned,
            "cells": [{key: cell[key] for key in ("load", "strategy", "metrics")} for cell in results["cells"]],
            "bounds": results["bounds"],
            "schedule": {"snapshot": asked, "answer": answer},
            "files": {name: str(path) for name, path in files.items()},
        }
        typer.echo(json.dumps(summary))


def _nothing(text: str) -> None:
    """Says nothing: with --json only the JSON goes to stdout."""


def _data(out: Path) -> Data:
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


def _train(telemetry: Path, model: Path) -> list[dict[str, Any]]:
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


def _scenarios(path: Path, fleet: str) -> tuple[list["Scenario"], str]:
    """The trace at each load, and what of it is replayed, in words."""
    from kairos.adapters.simulator.scenario import Scenario
    from kairos.adapters.traces import read_trace

    trace = read_trace(path)
    limit_s = _limit_s(trace)
    jitter_s = TICK_S if "mooncake_conversation" in trace.name else 0.0
    target = f"fixed:{TTFT_S:g}/tpot:{TPOT_S:g}"
    span_s = float(trace.arrival_s.max() - trace.arrival_s.min())
    replayed = f"all {len(trace):,} requests ({span_s:,.0f} s)"
    if limit_s is not None:
        replayed = f"the first {limit_s:,.0f} s of {span_s:,.0f} s"
    if jitter_s:
        replayed += f", arrivals spread over their {jitter_s:g} s ticks"
    return [Scenario(path, fleet, target, load, jitter_s=jitter_s, limit_s=limit_s) for load in LOADS], replayed


def _limit_s(trace: "Trace") -> float | None:
    """How many seconds of the trace can be simulated in a demo; None: all of it."""
    import numpy as np

    order = np.argsort(trace.arrival_s, kind="stable")
    tokens = np.cumsum(trace.output_tokens[order])
    count = min(MOST_REQUESTS, int(np.searchsorted(tokens, MOST_OUTPUT_TOKENS)))
    if count >= len(order):
        return None
    return float(trace.arrival_s[order[count]] - trace.arrival_s[order[0]])


def _compare(scenarios: list["Scenario"], out: Path, command: str) -> dict[str, Any]:
    from kairos.adapters.report import write_report
    from kairos.adapters.simulator.compare import Plan, compare
    from kairos.adapters.simulator.run import Knobs

    plan = Plan(scenarios, STRATEGIES, range(SEEDS), Knobs(noise=NOISE))
    began_s = time.monotonic()
    runs = len(plan.runs())
    typer.echo(f"{runs} runs, one to two minutes ...", err=True)
    with progress(f"{runs} runs", runs) as advance:
        results = compare(plan, out, command, -1, advance)
    typer.echo(f"{runs} runs in {time.monotonic() - began_s:.0f} s", err=True)
    write_report(results, out / "report.html")
    return results


def _print_comparison(results: dict[str, Any]) -> None:
    from kairos.adapters.cli.simulate import print_results

    print_results(results, verdicts_on="kairos")


def _snapshot(scenario: "Scenario") -> dict[str, Any]:
    """A few arrivals in a row with the most work per second, as the last of them arrives, and an idle fleet."""
    import numpy as np

    from kairos.adapters.simulator.scenario import workload_of

    workload = workload_of(scenario)
    arrival_s = workload.arrival_s
    asked = min(ASKED, len(workload))
    span_s = arrival_s[asked - 1 :] - arrival_s[: len(arrival_s) - asked + 1]
    tokens = np.convolve(workload.prompt_tokens, np.ones(asked), "valid")
    first = int(np.argmax(tokens / np.maximum(span_s, 1.0)))
    rows = range(first, first + asked)
    return {
        "now_s": float(arrival_s[rows[-1]]),
        "instances": [
            {"instance_id": "prefill-0", "role": "prefill", "profile": PROFILE, "chunk_tokens": 8192},
            {"instance_id": "decode-0", "role": "decode", "profile": PROFILE, "kv_tokens": 1_200_000},
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


@contextmanager
def _service(configuration: Path, log: Path) -> Iterator[str]:
    """`kairos serve` in a process of its own on a free port of the loopback; stopped at the end.

    Raises:
        KairosError: it ended, or did not answer in a minute.
    """
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = [sys.executable, "-c", "from kairos.adapters.cli import main; main()"]
    command = [*program, "serve", "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + START_LIMIT_S
        while True:
            if process.poll() is not None or time.monotonic() > until_s:
                raise KairosError(f"kairos serve did not start; its last words are in {log}")
            try:
                httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    import httpx

    response = httpx.post(url, json=body, timeout=30.0, trust_env=False)
    if response.status_code != httpx.codes.OK:
        raise KairosError(f"POST {url} answered {response.status_code}: {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer
