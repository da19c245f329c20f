"""`kairos doctor`: what the plugins in the engines of this machine do."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from kairos.adapters.cli.terminal import percent
from kairos.adapters.embedded.settings import load_settings
from kairos.adapters.embedded.status import EngineStatus, read_all, spoken


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where plugins write; default: as KAIROS_ENGINE_... set it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say whether the plugin is loaded in an engine here, what it decides, and what it costs.

    Run it where the engine runs, as the same user. Exit code 1: no plugin is at work.

    Example: kairos doctor
    """
    where = folder or load_settings().status_folder()
    found = read_all(where)
    if as_json:
        typer.echo(json.dumps([spoken(status) for status in found], indent=2))
    elif not found:
        typer.echo(
            f"no plugin wrote to {where}: no engine runs with Kairos here, or it runs as another user, in another "
            "container, or with another status_dir; see docs/engines.md"
        )
    else:
        typer.echo("\n\n".join(described(status) for status in found))
    if not any(status.is_alive for status in found):
        raise typer.Exit(1)


def described(status: EngineStatus) -> str:
    """A plugin in words."""
    ago_s = max(0.0, time.time() - status.written_s)
    state = "at work" if status.is_alive else f"NOT at work: it wrote {ago_s:.0f} s ago"
    tested = "" if status.tested else " (the plugin was not run with this version)"
    lines = [
        f"{status.engine} {status.engine_version}{tested}, process {status.pid}: Kairos {status.kairos} is {state}",
        f"profile     {status.profile_id}, step times from {status.step_times}",
        f"strategy    {status.strategy}",
        f"decides     {'; '.join(status.decides)}",
        f"stalls      {'a decision is stopped' if status.stops_stalls else 'a decision is only noticed'} at its budget",
        f"steps       {status.steps:,}{_median_ms(status.step_p50_s)}",
        f"overhead    {_overhead(status)}",
        f"decided     {_counts(status.counts)}",
        f"fallbacks   {_counts(status.fallbacks) if status.fallbacks else 'none'}",
    ]
    if status.control_plane is not None:
        reached = "never reached" if status.reached_s is None else f"reached {time.time() - status.reached_s:.0f} s ago"
        lines.append(f"control     {status.control_plane}, {reached}; {_counts(status.exchanged)}")
    return "\n".join(lines)


def _overhead(status: EngineStatus) -> str:
    if status.overhead_p50_s is None or status.overhead_p99_s is None:
        return "no step yet"
    share = f", {percent(status.overhead_p50_s / status.step_p50_s)} of a step" if status.step_p50_s else ""
    return f"{status.overhead_p50_s * 1e6:.0f} us a step, p99 {status.overhead_p99_s * 1e6:.0f} us{share}"


def _median_ms(seconds: float | None) -> str:
    return "" if seconds is None else f", median {seconds * 1e3:.1f} ms"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "nothing yet"
