"""`kairos simulate`, `kairos compare` and `kairos bound`."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kairos.adapters.cli.terminal import percent, progress, tell_summary
from kairos.scheduler_core.errors import ConfigError

if TYPE_CHECKING:
    from kairos.adapters.simulator.run import Knobs

Fleet = Annotated[str, typer.Option(help="A kairos.yaml with profiles and a fleet, or paper, b300, h100.")]
Target = Annotated[str | None, typer.Option(help="fixed:8, scaled:1,5 or classes:2,15, with /tpot:0.05 if wanted.")]
Load = Annotated[float | None, typer.Option(help="Offered prefill work per instance and second; scales time.")]
DecodeLoad = Annotated[float | None, typer.Option(help="Share of the decode instances' SLO capacity; scales time.")]
TimeScale = Annotated[float | None, typer.Option(help="Multiply all arrival times.")]
Jitter = Annotated[float, typer.Option(help="Add up to so many seconds to each arrival.", min=0)]
JitterSeed = Annotated[int, typer.Option(help="Of the jitter.", min=0)]
Limit = Annotated[float | None, typer.Option("--duration", help="Only the first so many seconds of the trace.")]
Noise = Annotated[float, typer.Option(help="Sigma of the lognormal factor on what steps really take.", min=0)]
Error = Annotated[float, typer.Option(help="Sigma of the lognormal error of what policies are told.", min=0)]
Share = Annotated[
    float | None, typer.Option(help="The share guard's share; 0 = off; default: the configuration's.", min=0, max=0.99)
]
Stages = Annotated[Literal["all", "prefill"], typer.Option(help="prefill: TTFT alone, exact and much faster.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace: CSV or CSV.gz.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    app.command()(simulate)
    app.command()(compare)
    app.command()(bound)


def simulate(
    trace: TraceFile,
    fleet: Fleet,
    out: Out,
    strategy: Annotated[str | None, typer.Option(help="A name or an expression; default: the active one.")] = None,
    target: Target = None,
    load: Load = None,
    decode_load: DecodeLoad = None,
    time_scale: TimeScale = None,
    jitter: Jitter = 0.0,
    jitter_seed: JitterSeed = 0,
    duration: Limit = None,
    seed: Annotated[int, typer.Option(help="Of noise and errors.", min=0)] = 0,
    noise: Noise = 0.0,
    predictor_error: Error = 0.0,
    deferred_share: Share = None,
    stages: Stages = "all",
    as_json: Json = False,
) -> None:
    """Run one strategy on a trace; write requests.csv, steps.csv, events.parquet and summary.json.

    Example: kairos simulate trace.csv.gz --fleet b300 --strategy kairos --load 0.9 --target fixed:2/tpot:0.05 --out run
    """
    import kairos
    from kairos.adapters.simulator.evidence import Meta
    from kairos.adapters.simulator.log import write_run
    from kairos.adapters.simulator.run import simulate as run_once
    from kairos.adapters.simulator.scenario import Scenario, fleet_of, settings_of, strategy_of, workload_of

    scenario = Scenario(trace, fleet, target, load, decode_load, time_scale, jitter, jitter_seed, duration)
    settings = settings_of(fleet)
    chosen = strategy_of(settings, strategy or settings.active)
    workload = workload_of(scenario)
    knobs = _knobs(fleet, deferred_share, seed, noise, predictor_error, stages, keep_steps=True)
    with progress("simulating", None):
        run = run_once(workload, fleet_of(fleet), chosen, knobs)
    meta = Meta(kairos.__version__, command_line(), [seed], settings.model_dump(mode="json"))
    summary = write_run(run, out, meta)
    for note in _notes(scenario, run.notes, run.fallbacks):
        typer.echo(f"note: {note}", err=True)
    tell_summary(summary, f"{chosen.name} on {workload.trace}: {len(workload):,} requests", out, as_json)


def compare(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Traces: CSV or CSV.gz.")],
    fleet: Fleet,
    out: Out,
    strategies: Annotated[str, typer.Option(help="Names or expressions, comma-separated; the first is the baseline.")],
    loads: Annotated[str | None, typer.Option(help="Prefill loads, comma-separated; default: as recorded.")] = None,
    decode_loads: Annotated[
        str | None,
        typer.Option("--decode-loads", "--decode-load", help="Shares of the decode SLO capacity, comma-separated."),
    ] = None,
    time_scale: TimeScale = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 5,
    target: Annotated[list[str] | None, typer.Option(help="As of simulate; may be given several times.")] = None,
    jitter: Jitter = 0.0,
    jitter_seed: JitterSeed = 0,
    duration: Limit = None,
    noise: Noise = 0.0,
    predictor_error: Error = 0.0,
    deferred_share: Share = None,
    stages: Stages = "all",
    jobs: Annotated[int, typer.Option(help="Processes; -1 = one a core.")] = -1,
    as_json: Json = False,
) -> None:
    """Compare strategies on the same arrivals and noise; write results.json and report.html, end with verdicts.

    Finished runs are kept in OUT/runs: the same command again goes on where it stopped.

    Example: kairos compare trace.csv.gz --fleet b300 --strategies tuned,kairos --loads 0.7,1.0,1.2 --seeds 5 --out cmp
    """
    from kairos.adapters.report import write_report
    from kairos.adapters.simulator.compare import Plan
    from kairos.adapters.simulator.compare import compare as run_all
    from kairos.adapters.simulator.scenario import Scenario
    from kairos.scheduler_core.strategy import split_strategies

    names = list(dict.fromkeys(split_strategies(strategies)))
    if not names:
        raise ConfigError("--strategies is empty; name at least one, e.g. engine-default,kairos")
    targets: list[str | None] = [*target] if target else [None]
    scenarios = [
        Scenario(trace, fleet, one_target, load, decode_load, time_scale, jitter, jitter_seed, duration)
        for trace in traces
        for one_target in targets
        for load in (_numbers("--loads", loads) if loads else [None])
        for decode_load in (_numbers("--decode-loads", decode_loads) if decode_loads else [None])
    ]
    knobs = _knobs(fleet, deferred_share, 0, noise, predictor_error, stages)
    plan = Plan(scenarios, names, range(seeds), knobs)
    runs = len(plan.runs())
    with progress(f"{runs} runs", runs) as advance:
        results = run_all(plan, out, command_line(), jobs, advance)
    report = out / "report.html"
    write_report(results, report)
    for note in results["meta"]["notes"]:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(results))
        return
    print_results(results)
    typer.echo(f"\nresults in {out / 'results.json'}, report in {report}")


def bound(
    trace: TraceFile,
    fleet: Fleet,
    target: Target = None,
    load: Load = None,
    decode_load: DecodeLoad = None,
    time_scale: TimeScale = None,
    jitter: Jitter = 0.0,
    jitter_seed: JitterSeed = 0,
    duration: Limit = None,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    noise: Noise = 0.0,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Also for TTFT and TPOT both; needs noise 0, takes up to a minute.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what no scheduler could exceed in TTFT attainment, even if it knew the future.

    Example: kairos bound trace.csv.gz --fleet b300 --load 1.2 --target fixed:2
    """
    from kairos.adapters.simulator.bounds import end_to_end_bound, ttft_bound
    from kairos.adapters.simulator.run import Knobs
    from kairos.adapters.simulator.scenario import Scenario, fleet_of, workload_of

    scenario = Scenario(trace, fleet, target, load, decode_load, time_scale, jitter, jitter_seed, duration)
    workload, instances, knobs = workload_of(scenario), fleet_of(fleet), Knobs(seed=seed, noise=noise)
    found = {"ttft": ttft_bound(workload, instances, knobs)}
    if end_to_end:
        found["slo"] = end_to_end_bound(workload, instances, knobs)
    if as_json:
        answer: dict[str, float] = {"requests": len(workload)}
        for name, count in found.items():
            answer |= {f"{name}_met_at_most": count, f"{name}_attainment": count / len(workload)}
        typer.echo(json.dumps(answer))
        return
    for name, count in found.items():
        what = "their TTFT target" if name == "ttft" else "both targets"
        share = percent(count / len(workload))
        typer.echo(f"at most {count:,} of {len(workload):,} requests can meet {what}: {share}")


def print_results(results: dict[str, Any], verdicts_on: str | None = None) -> None:
    """The tables of a comparison and a verdict per pair, as text.

    Args:
        results: results.json.
        verdicts_on: only the verdicts on this strategy; None: on all.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    bounds: dict[tuple[Any, ...], list[float]] = {}
    for b in results["bounds"]:
        bounds.setdefault((b["trace"], b["target"], b["load"]), []).append(b["ttft_attainment"])
    places = list(dict.fromkeys((c["trace"], c["target"], c["load"]) for c in results["cells"]))
    for place in places:
        trace, target, load = place
        kind = " (SYNTHETIC)" if results["meta"]["synthetic"].get(trace) else ""
        at = "as recorded" if load is None else f"load {load:g}"
        console.print(f"{trace}{kind}, target {target}, {at}", soft_wrap=True)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("strategy", no_wrap=True)
        for column in ("TTFT met", "TPOT met", "both met", "goodput /s", "TTFT p99", "worst wait"):
            table.add_column(column, justify="right")
        for cell in results["cells"]:
            if (cell["trace"], cell["target"], cell["load"]) == place:
                m = cell["metrics"]
                table.add_row(
                    cell["strategy"],
                    *(_share(m[name]) for name in ("ttft_attainment", "tpot_attainment", "slo_attainment")),
                    _plain(m["goodput_per_s"]),
                    _plain(m["ttft_s"]["p99"], " s"),
                    _plain(m["worst_wait_s"], " s"),
                )
        mean = sum(bounds[place]) / len(bounds[place])
        table.add_row("no scheduler exceeds", percent(mean), "", "", "", "", "", style="italic")
        console.print(table, "")
    console.print("Verdicts (95 % intervals over time blocks of the trace; results.json has one for every metric):")
    metric = results["pairs"][0]["metric"] if results["pairs"] else None
    for pair, sentence in zip(results["pairs"], results["meta"]["sentences"], strict=True):
        if pair["metric"] == metric and verdicts_on in (None, pair["a"]):
            console.print(f"- {sentence}", soft_wrap=True)
    expected = results["meta"]["expected_false"]
    console.print(f"Of all of them, {expected:.1f} would be called better or worse by chance if nothing differed.")


def _share(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["low"] is None:
        return percent(value["mean"])
    return f"{percent(value['mean'])} ({100 * value['low']:.1f}–{100 * value['high']:.1f})"


def _plain(value: dict[str, Any] | None, unit: str = "") -> str:
    return "-" if value is None else f"{value['mean']:.2f}{unit}"


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; write numbers separated by commas, e.g. 0.7,1.0,1.2") from None


def _knobs(
    fleet: str,
    deferred_share: float | None,
    seed: int,
    noise: float,
    predictor_error: float,
    stages: Literal["all", "prefill"],
    keep_steps: bool = False,
) -> "Knobs":
    from kairos.adapters.simulator.run import Knobs
    from kairos.adapters.simulator.scenario import settings_of

    share = settings_of(fleet).guards.deferred_share if deferred_share is None else deferred_share
    return Knobs(seed, noise, predictor_error, share, stages, keep_steps)


def _notes(scenario: Any, notes: Any, fallbacks: Any) -> Iterator[str]:
    from kairos.adapters.simulator.scenario import notes_of

    yield from notes_of(scenario.trace)
    yield from notes
    for what, count in fallbacks.items():
        yield f"{count} decisions by arrival order, since {what}"


def command_line() -> str:
    """How the program was called."""
    return shlex.join(["kairos", *sys.argv[1:]])
