"""`kairos telemetry load`: files into the database."""

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from kairos.adapters.cli.db import Config, Json, Url, opened

T = TypeVar("T")

BATCH_ROWS = 10_000


def register(app: typer.Typer) -> None:
    """Add `telemetry` and its command."""
    telemetry = typer.Typer(no_args_is_help=True, help="Telemetry in the database.")
    telemetry.callback()(lambda: None)  # keeps `load` a command of its own while it is the only one
    telemetry.command()(load)
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


def _parts(rows: list[T]) -> list[list[T]]:
    return [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]


def _named(rows: object) -> tuple[str, bytes]:
    """Id and digest of a batch, from what is in it: the same rows have the same."""
    digest = blake2b(msgspec.msgpack.encode(rows), digest_size=16).digest()
    return f"rows-{digest.hex()}", digest
