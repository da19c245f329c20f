"""`kairos demo`: a fleet that is measured, learned from, compared by replay and switched, on this machine alone."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kairos.adapters.cli.terminal import percent, progress

if TYPE_CHECKING:
    from kairos.adapters.cli.demo_live import Engine, LiveFleet
    from kairos.adapters.cli.demo_replay import Data
    from kairos.adapters.loadgen import LiveRun
    from kairos.adapters.simulator.tables import Workload

BEFORE, AFTER = "engine-default", "kairos"
MOST_SENT = 400
"""Requests that are sent to the live fleet at a time."""


def register(app: typer.Typer) -> None:
    """Add `demo`."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("demo-out"),
    seconds: Annotated[float, typer.Option(help="How long the trace is sent, twice.", min=1.0)] = 45.0,
    engine: Annotated[
        Literal["emulated", "torch"],
        typer.Option(help="Of the live workers; torch: a small real model, computed here."),
    ] = "emulated",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Run a fleet, learn from its telemetry, compare strategies by replay, switch to the best, and look again.

    Starts the service on a database of its own, emulated prefill and decode workers and the gateway, on free ports of
    this machine. Takes real data from the folder that KAIROS_DATA names (laid out like the data pack: traces/,
    telemetry/), and otherwise generates a synthetic trace and telemetry. Takes three to five minutes on 2 cores.

    Example: kairos demo --out demo-out
    """
    out.mkdir(parents=True, exist_ok=True)
    with _ended_by_sigterm():
        summary = _Demo(out, seconds, engine, _nothing if as_json else typer.echo).tell()
    if as_json:
        typer.echo(json.dumps(summary))


def _nothing(text: str = "") -> None:
    """Says nothing: with --json only the JSON goes to stdout."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, with what it started."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Demo:
    """The story, told once; `summary` is what of it goes into the JSON."""

    def __init__(self, out: Path, seconds: float, engine: "Engine", say: Any) -> None:
        self.out, self.seconds, self.engine, self.say = out, seconds, engine, say
        self.summary: dict[str, Any] = {}

    def tell(self) -> dict[str, Any]:
        """All of it."""
        from kairos.adapters.cli import demo_replay as replay
        from kairos.adapters.cli import demo_torch
        from kairos.adapters.cli.demo_live import live_fleet
        from kairos.adapters.simulator.scenario import workload_of

        data = replay.demo_data(self.out)
        mark = " (SYNTHETIC)" if data.synthetic else ""
        self.summary |= {"synthetic": data.synthetic, "trace": str(data.trace), "telemetry": str(data.telemetry)}

        configuration = self.out / "kairos.yaml"
        hardware = replay.write_configuration(configuration, self._emulated_gpus(data, mark))
        scenarios, replayed = replay.scenarios_of(data.trace, str(configuration))
        torch = self.engine == "torch"
        profile, workers = (demo_torch.PROFILE, demo_torch.hardware()) if torch else (replay.PROFILE, hardware)
        load = replay.LOADS[-1]
        with live_fleet(self.out, workers, profile, BEFORE, self.engine) as fleet:
            self.say(f"\n2. Run a fleet of one prefill and one decode worker ({self.engine}) under {BEFORE}")
            self.say(f"   service {fleet.service_url}, gateway {fleet.gateway_url}, logs in {self.out}")
            sent = replay.beginning(scenarios[-1], math.inf if torch else self.seconds, MOST_SENT)
            if torch:
                sent = self._for_torch(fleet, demo_torch.shortened(sent), load)
            self.say(f"   sent {len(sent)} requests of {data.trace}{mark} in {sent.arrival_s[-1]:.0f} s, load {load:g}")
            self.began_at_s = time.time()
            before = self._send(fleet, sent, BEFORE)

            self._learn(fleet)

            self.say(f"\n4. Compare on {data.trace}{mark}: {replayed}; {replay.SEEDS} seeds, noise {replay.NOISE:g}\n")
            results = replay.compared(scenarios, self.out, f"kairos demo --out {self.out}{mark}")
            self._print(results)

            took_s = fleet.switch(AFTER)
            self.say(
                f"\n5. Switch the running fleet to {AFTER}: it decides so {took_s:.1f} s later; send the same again"
            )
            after = self._send(fleet, sent, AFTER)
            self._look_back(fleet, sent)
            (prefill,), (decode,) = workers["fleet"]["prefill"], workers["fleet"]["decode"]
            busy = sent if torch else workload_of(scenarios[1])
            asked = replay.snapshot_of(busy, profile, prefill["chunk_tokens"], decode["kv_tokens"])
            self._ask(fleet, asked)
        self._report(results, {BEFORE: before, AFTER: after}, load)
        return self.summary

    def _emulated_gpus(self, data: "Data", mark: str) -> Path:
        """Step times for the workers."""
        from kairos.adapters.cli import demo_replay as replay

        self.say(f"1. Emulate GPUs with the step times in {data.telemetry}{mark}")
        model = self.out / "model.kairos"
        self.summary["training"] = replay.learn(data.telemetry, model)
        for row in self.summary["training"]:
            self.say(
                f"   {row['kind']:8} median error {percent(row['median_ape'], 2)} on held-back operating points,"
                f" physical prior {percent(row['prior_median_ape'], 2)} (median of {row['profiles']} profiles)"
            )
        return model

    def _for_torch(self, fleet: "LiveFleet", sent: "Workload", load: float) -> "Workload":
        """What the engine can take at that load, after a look at how fast it is."""
        from kairos.adapters.cli import demo_torch

        for _ in range(2):  # the first one warms up
            seen = fleet.send(demo_torch.probe(), demo_torch.MODEL, lambda ended: None)
        probe_s = float(seen.requests.ttft_s[0])
        self.say(f"   prompts and outputs made shorter; {demo_torch.PROBE_TOKENS:,} tokens take it {probe_s:.2f} s")
        return demo_torch.at_load(sent, load, probe_s, self.seconds)

    def _send(self, fleet: "LiveFleet", sent: "Workload", strategy: str) -> "LiveRun":
        """Send the trace, say what came of it."""
        from kairos.adapters.cli import demo_replay as replay
        from kairos.adapters.cli import demo_torch
        from kairos.adapters.loadgen import write_live_run
        from kairos.adapters.simulator.evidence import Meta

        with progress("sending", len(sent)) as advance:
            run = fleet.send(sent, demo_torch.MODEL if self.engine == "torch" else replay.MODEL, advance)
        write_live_run(run, self.out / f"live-{strategy}", Meta(_version(), "kairos demo", [], {}))
        self.say(f"   each at its time: {1e3 * run.lag_p99_s:.1f} ms late at p99")
        for problem, count in run.problems.items():
            typer.echo(f"note: {count} requests did not finish: {problem}", err=True)
        return run

    def _learn(self, fleet: "LiveFleet") -> None:
        """Train on what the workers logged, let it serve."""
        steps, self.last_step = fleet.steps()
        logged = ", ".join(f"{len(of_kind):,} {of_kind.kind}" for of_kind in steps)
        self.say(f"\n3. Train on the steps that the workers logged: {logged}")
        model = fleet.train()
        self.say(f"   {model} was promoted; the gateway predicts with it")

    def _print(self, results: dict[str, Any]) -> None:
        from kairos.adapters.cli.simulate import print_results

        if self.say is not _nothing:
            print_results(results, verdicts_on=AFTER)

    def _look_back(self, fleet: "LiveFleet", sent: "Workload") -> None:
        """Before and after, from the store; predictions against the steps that were logged since."""
        from kairos.adapters.cli import demo_replay as replay

        self.say("\n   from the store                TTFT met   TPOT met   both met   kairos simulate says")
        self.summary["live"] = fleet.attained(self.began_at_s)
        for name, row in self.summary["live"].items():
            row["simulated"] = replay.replayed_metrics(sent, fleet.learned, name.partition("@")[0])
            shares = "".join(f"{percent(row[key]):>11}" for key in _ATTAINMENTS)
            self.say(f"   {name:27}{shares}   {percent(row['simulated']['slo_attainment'])}")
        self.summary["errors"] = errors = fleet.prediction_errors(self.last_step)
        for kind, row in errors.items():
            self.say(
                f"   {row['steps']:,} {kind} steps since: median error {percent(row['learned'], 2)} by the model,"
                f" {percent(row['prior'], 2)} by bandwidth and FLOPs"
            )

    def _ask(self, fleet: "LiveFleet", asked: dict[str, Any]) -> None:
        """One snapshot, decided over HTTP."""
        waiting = asked["waiting"]
        self.say(
            f"\n6. Ask POST {fleet.service_url}/schedule who runs next of the {len(waiting)} busiest arrivals in a row"
        )
        answer = fleet.post("/schedule", asked)
        self.summary["schedule"] = {"snapshot": asked, "answer": answer}
        prompts = {request["request_id"]: request["prompt_tokens"] for request in waiting}
        for row in answer["prefill"]:
            self.say(
                f"   {row['order'] + 1}. request {row['request_id']:>5}: {prompts[row['request_id']]:>7,} tokens,"
                f" predicted TTFT {row['predicted_ttft_s']:5.2f} s, {'in time' if row['on_time'] else 'late'}:"
                f" {row['reason']['code']}"
            )

    def _report(self, results: dict[str, Any], live: dict[str, "LiveRun"], load: float | None) -> None:
        """report.html and results.json, with what was measured live."""
        import msgspec

        from kairos.adapters.report import write_report
        from kairos.adapters.simulator.compare import add_live_runs
        from kairos.adapters.simulator.scenario import fleet_of

        first = results["cells"][0]
        place = {"trace": f"{first['trace']}, live", "target": first["target"], "load": load}
        results["meta"]["synthetic"][place["trace"]] = results["meta"]["synthetic"][first["trace"]]
        self.summary["cells"] = [
            {key: cell[key] for key in ("load", "strategy", "metrics")} for cell in results["cells"]
        ]
        self.summary["bounds"] = list(results["bounds"])
        add_live_runs(results, place, live, fleet_of(str(self.out / "learned.yaml")))
        path, report = self.out / "results.json", self.out / "report.html"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
        write_report(results, report)
        self.say(f"\n7. Open {report} in a browser; every number is in {path}")
        files = {"model": "model.kairos", "configuration": "kairos.yaml", "results": path.name, "report": report.name}
        self.summary["files"] = {name: str(self.out / file) for name, file in files.items()}


_ATTAINMENTS = ("ttft_attainment", "tpot_attainment", "slo_attainment")


def _version() -> str:
    import kairos

    return kairos.__version__
