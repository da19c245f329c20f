"""`kairos load`."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from kairos.adapters.cli.simulate import (
    DecodeLoad,
    Jitter,
    JitterSeed,
    Json,
    Limit,
    Load,
    Out,
    Target,
    TimeScale,
    TraceFile,
    command_line,
)
from kairos.adapters.cli.terminal import progress, tell_summary

if TYPE_CHECKING:
    from kairos.scheduler_core.config import Settings


def register(app: typer.Typer) -> None:
    """Add `load`."""
    app.command()(load)


def load(
    trace: TraceFile,
    fleet: Annotated[str, typer.Option(help="The kairos.yaml of the fleet behind the endpoint, or paper, b300, h100.")],
    url: Annotated[str, typer.Option(help="Address of an OpenAI-compatible endpoint.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="Asked for; default: the first that the fleet serves.")] = None,
    key: Annotated[str, typer.Option(help="Bearer key for it.", envvar="KAIROS_GATEWAY_KEY", show_envvar=True)] = "",
    target: Target = None,
    load: Load = None,
    decode_load: DecodeLoad = None,
    time_scale: TimeScale = None,
    jitter: Jitter = 0.0,
    jitter_seed: JitterSeed = 0,
    duration: Limit = None,
    as_json: Json = False,
) -> None:
    """Send a trace to a live endpoint, each request at its arrival time; write requests.csv, summary.json, lag.json.

    Arrivals, targets and files are those of `simulate` with the same options: live and simulated runs can be compared.

    Example: kairos load trace.csv.gz --fleet kairos.yaml --url http://127.0.0.1:8000 --load 0.9 --out live
    """
    import uvloop

    import kairos
    from kairos.adapters.loadgen import Endpoint, send_all, write_live_run
    from kairos.adapters.simulator.evidence import Meta
    from kairos.adapters.simulator.scenario import Scenario, settings_of, workload_of

    settings = settings_of(fleet)
    workload = workload_of(Scenario(trace, fleet, target, load, decode_load, time_scale, jitter, jitter_seed, duration))
    endpoint = Endpoint(url, model or first_model(settings), frozenset(settings.slo.classes), key)
    with progress("sending", len(workload)) as advance, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run = runner.run(send_all(workload, endpoint, advance))
    meta = Meta(kairos.__version__, command_line(), [], settings.model_dump(mode="json"))
    summary = write_live_run(run, out, meta)
    for problem, count in run.problems.items():
        typer.echo(f"note: {count} requests did not finish: {problem}", err=True)
    headline = f"{workload.trace} on {url}: {len(workload):,} requests, sent {1e3 * run.lag_p99_s:.1f} ms late at p99"
    tell_summary(summary, headline, out, as_json)


def first_model(settings: "Settings") -> str:
    """A model that the fleet serves."""
    return next(settings.served_models(group)[0] for _, _, group in settings.fleet.groups())
