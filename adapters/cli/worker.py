"""`kairos worker emulate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kairos.adapters.cli.torch_worker import torch_worker


def register(app: typer.Typer) -> None:
    """Add `worker` and its commands."""
    worker = typer.Typer(no_args_is_help=True, help="Workers for tests, demos and load.")
    worker.command()(emulate)
    worker.command("torch")(torch_worker)
    app.add_typer(worker, name="worker")


def emulate(
    config: Annotated[Path, typer.Option(help="A kairos.yaml; the worker is one of a group of its fleet.")],
    role: Annotated[Literal["prefill", "decode", "mixed"], typer.Option(help="Which groups.")] = "mixed",
    group: Annotated[int, typer.Option(help="Which group of the role, from 0.", min=0)] = 0,
    whole_fleet: Annotated[
        bool, typer.Option(help="One worker for each url of the fleet, there; without --role, --group, --port.")
    ] = False,
    engine: Annotated[
        Literal["vllm", "sglang"] | None, typer.Option(help="Whose dialect; default: the group's, else vllm.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 0,
    bootstrap_port: Annotated[
        int | None, typer.Option(help="Where decode asks for KV; default: the group's.", min=0, max=65535)
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Real seconds per second of the profile.", min=1e-6)] = 1.0,
    lease_s: Annotated[float, typer.Option(help="How long KV is held for decode.", min=0.0)] = 30.0,
    prefix_cache: Annotated[bool, typer.Option(help="Keep the KV of prompts.")] = False,
    fault: Annotated[list[str] | None, typer.Option(help="KIND:SHARE of requests that fail so.")] = None,
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    control_plane: Annotated[str | None, typer.Option(help="Where its steps are sent as telemetry.")] = None,
    control_plane_key: Annotated[
        str, typer.Option(help="Bearer key for it.", envvar="KAIROS_CONTROL_PLANE_KEY", show_envvar=True)
    ] = "",
) -> None:
    """Run a worker that speaks an engine's HTTP dialect, with the step times of a profile in place of a GPU.

    Example: kairos worker emulate --config kairos.yaml --role prefill --port 8110
    """
    from kairos.adapters.emulator.faults import parse_faults
    from kairos.adapters.emulator.process import fleet_options, group_of, reporting_to, run_workers, worker_options
    from kairos.predictors.profiles import step_times_of
    from kairos.scheduler_core.config_file import load_settings

    settings = load_settings(config)
    told: dict[str, Any] = {
        "engine": engine,
        "bootstrap_port": bootstrap_port,
        "time_scale": time_scale,
        "lease_s": lease_s,
        "prefix_cache": prefix_cache,
        "faults": parse_faults(fault or []),
        "seed": seed,
    }
    groups = [g for _, _, g in settings.fleet.groups()] if whole_fleet else [group_of(settings, role, group)]
    planes = {}
    if control_plane is not None:
        for name in {each.profile for each in groups}:
            planes[name] = reporting_to(control_plane, settings.profiles[name].as_profile(), control_plane_key)
    if whole_fleet:
        workers = fleet_options(settings, step_times_of, planes, **told)
    else:
        plane = planes.get(groups[0].profile)
        place: dict[str, Any] = {"host": host, "port": port, "on_step": plane and plane.note}
        workers = [worker_options(settings, step_times_of, role, group, **place, **told)]
    run_workers(workers, planes.values())
