"""`kairos rehearse`: a simulated fleet takes part in the experiments of a running control plane."""

from pathlib import Path
from typing import Annotated

import typer

from kairos.adapters.cli.control import DEFAULT_URL, Key, Url
from kairos.adapters.cli.simulate import Jitter, JitterSeed, Load, Noise, Target, TimeScale, TraceFile
from kairos.scheduler_core.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `rehearse`."""
    app.command()(rehearse)


def rehearse(
    trace: TraceFile,
    config: Annotated[Path, typer.Option(help="The kairos.yaml of the control plane: fleet, clock, schedule key.")],
    target: Target = None,
    load: Load = None,
    time_scale: TimeScale = None,
    jitter: Jitter = 0.0,
    jitter_seed: JitterSeed = 0,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    noise: Noise = 0.0,
    pools: Annotated[int, typer.Option(help="Two equal halves of the fleet, for the design pools.", min=1, max=2)] = 1,
    name: Annotated[str, typer.Option(help="This data plane's, in its reports.")] = "simulated",
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Live on the fast clock of a control plane until the trace ends: pull the strategy, run it, report outcomes.

    Example: kairos rehearse trace.csv.gz --config kairos.yaml --load 0.8 --target fixed:2
    """
    import httpx

    from kairos.adapters.dataplane.simulated import SimulatedDataPlane
    from kairos.adapters.simulator.run import Knobs
    from kairos.adapters.simulator.scenario import Scenario, fleet_of, settings_of, strategy_of, workload_of
    from kairos.scheduler_core.experiment import Clock

    settings = settings_of(str(config))
    if settings.service.schedule_key is None:
        raise ConfigError("service.schedule_key is not set; data planes check the schedules of experiments with it")
    workload = workload_of(Scenario(trace, str(config), target, load, None, time_scale, jitter, jitter_seed))
    clock = Clock(settings.service.clock_scale)
    origin_s = clock.now_s() - float(workload.arrival_s[0])
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers) as service:
        plane = SimulatedDataPlane(
            service,
            workload,
            origin_s,
            fleet_of(str(config)),
            strategy_of(settings, settings.active),
            settings.service.schedule_key.get_secret_value().encode(),
            Knobs(seed, noise, deferred_share=settings.guards.deferred_share),
            pools=pools,
            name=name,
        )
        plane.run(clock, origin_s + float(workload.arrival_s[-1]))
    typer.echo(f"{workload.trace}: {len(workload):,} requests arrived; {plane.dropped:,} outcomes were dropped")
