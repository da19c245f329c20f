"""`kairos telemetry load | scrape`: files into the database, engines into the control plane."""

import json
import os
import signal
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from kairos.adapters.cli.db import Config, Json, Url, opened

T = TypeVar("T")

BATCH_ROWS = 10_000


def register(app: typer.Typer) -> None:
    """Add `telemetry` and its commands."""
    telemetry = typer.Typer(no_args_is_help=True, help="Telemetry in the database.")
    telemetry.command()(load)
    telemetry.command()(scrape)
    app.add_typer(telemetry, name="telemetry")


def load(
    files: Annotated[list[Path], typer.Argument(help="CSV, CSV.gz or Parquet files, or folders of them.")],
    config: Config = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Store telemetry from files. Rows that were loaded before are not stored again.

    Example: kairos telemetry load telemetry/ --url sqlite:///kairos.db
    """
    from kairos.adapters.cli.terminal import progress
    from kairos.adapters.telemetry_files import read_telemetry, request_rows, step_rows, telemetry_files
    from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, StepBatch, add_batch
    from kairos.scheduler_core.service.store.revisions import require_served

    notes: list[str] = []
    paths = list(telemetry_files(files, notes))
    told: list[dict[str, Any]] = []
    with opened(config, url) as store, progress("loading", len(paths)) as done:
        require_served(store)
        for number, path in enumerate(paths):
            read = read_telemetry([path])
            notes += read.notes
            steps, requests = step_rows(read), request_rows(read)
            batches: list[StepBatch | RequestBatch] = [StepBatch(*_named(part), part) for part in _parts(steps)]
            batches += [RequestBatch(*_named(part), part) for part in _parts(requests)]
            counts: Counter[str] = Counter(stored=0, there_before=0)
            for batch in batches:
                with store.write() as connection:
                    stored = add_batch(connection, batch)
                counts["there_before" if stored.duplicate else "stored"] += stored.rows
            told.append({"file": str(path), **counts, "excluded": read.excluded})
            done(number + 1)
    for note in notes:
        typer.echo(f"kairos: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for line in told:
        left_out = "".join(f", {n} {flag} left out" for flag, n in line["excluded"].items())
        typer.echo(f"{line['file']}: {line['stored']} stored, {line['there_before']} there before{left_out}")


def scrape(
    config: Annotated[Path, typer.Option(help="A kairos.yaml whose fleet has groups with url and engine.")],
    to: Annotated[str, typer.Option(help="Address of the control plane; its key comes from KAIROS_API_KEY.")],
    every: Annotated[float, typer.Option(help="Seconds from one round to the next.", min=0.01)] = 5.0,
    rounds: Annotated[int | None, typer.Option(help="How many; default: until it is interrupted.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Ask the engines of a live fleet what they do, and send it to the control plane.

    Example: kairos telemetry scrape --config kairos.yaml --to http://127.0.0.1:8011
    """
    from kairos.adapters.sources.push import Push
    from kairos.adapters.sources.scrape import scrape as ask
    from kairos.scheduler_core.config_file import load_settings

    settings = load_settings(config)
    push, stopped = Push(to, os.environ.get("KAIROS_API_KEY", "")), Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        told = ask(settings, push, every, rounds, stopped, lambda line: typer.echo(f"kairos: {line}", err=True))
    finally:
        push.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo("rows: " + (", ".join(f"{rows} {what}" for what, rows in told.items()) or "none"))


def _parts(rows: list[T]) -> list[list[T]]:
    return [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]


def _named(rows: object) -> tuple[str, bytes]:
    """Id and digest of a batch, from what is in it: the same rows have the same."""
    digest = blake2b(msgspec.msgpack.encode(rows), digest_size=16).digest()
    return f"rows-{digest.hex()}", digest
