"""Rows a second into the store, beside what the database's own interfaces reach in the same run.

    python benchmarks/ingest.py [--postgresql postgresql://postgres@127.0.0.1/postgres]

100,000 decode steps in batches of 10,000, each committed. Ours starts from the rows as they were received (`StepRow`),
makes values of them, looks up recordings and keeps the batch's id; the peers get values that are ready:

- SQLite: SQLAlchemy Core, `insert(table)` with a list of mappings; the same pragmas, on the same disk
- PostgreSQL: psycopg's COPY, `write_row`; and SQLAlchemy Core

Repeats take turns; medians of seven. Writes results/ingest.json.
"""

import argparse
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from record import meta
from sqlalchemy import insert, make_url, text

from kairos.scheduler_core.service.store.queries.telemetry import StepBatch, add_batch
from kairos.scheduler_core.service.store.revisions import upgrade
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Step
from kairos.scheduler_core.telemetry import StepRow

ROWS, BATCH_ROWS, REPEATS = 100_000, 10_000, 7

COLUMNS = [column.key for column in Step.__table__.columns if column.key != "id"]


def row(n: int) -> StepRow:
    """A decode step; no two are alike."""
    batch = 1 + n % 64
    return StepRow(
        gpu="H100-80GB-SXM",
        model="acme/llama-8b",
        latency_ms=5.0 + n / ROWS,
        precision="bf16",
        engine="vllm-0.20.1",
        run=f"run-{n // BATCH_ROWS % 4}",
        batch_size=batch,
        sum_context_tokens=batch * (200 + n % 3000),
        prev_phase="decode",
    )


def values(r: StepRow) -> tuple[Any, ...]:
    """What the peers are given: ready values in the order of the table."""
    return 1, r.latency_ms / 1e3, 0, r.sum_context_tokens, 1, 0, 0, r.batch_size, 1, 3, False


def ours(store: Store, batches: list[list[StepRow]]) -> None:
    """The store's own way."""
    for batch in batches:
        with store.write() as connection:
            add_batch(connection, StepBatch(uuid.uuid4().hex, b"0" * 16, batch))


def core(store: Store, batches: list[list[dict[str, Any]]]) -> None:
    """SQLAlchemy Core."""
    for batch in batches:
        with store.write() as connection:
            connection.execute(insert(Step), batch)


def copy(store: Store, batches: list[list[tuple[Any, ...]]]) -> None:
    """psycopg's COPY."""
    for batch in batches:
        with store.write() as connection:
            cursor: Any = connection.connection.cursor()
            with cursor.copy(f"COPY steps ({', '.join(COLUMNS)}) FROM STDIN") as into:
                for row in batch:
                    into.write_row(row)


def measured(store: Store, goal: tuple[str, float]) -> dict[str, Any]:
    """Rows a second of each, and the ratio that has a goal."""
    rows = [[row(n) for n in range(start, start + BATCH_ROWS)] for start in range(0, ROWS, BATCH_ROWS)]
    tuples = [[values(r) for r in batch] for batch in rows]
    mappings = [[dict(zip(COLUMNS, r, strict=True)) for r in batch] for batch in tuples]
    ways: dict[str, Callable[[], None]] = {"kairos": lambda: ours(store, rows), "core": lambda: core(store, mappings)}
    if not store.embedded:
        ways["copy"] = lambda: copy(store, tuples)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            with store.write() as connection:
                connection.execute(text("DELETE FROM steps"))
            began_s = time.perf_counter()
            way()
            rates[name].append(ROWS / (time.perf_counter() - began_s))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    peer, least = goal
    ratio = statistics.median(a / b for a, b in zip(rates["kairos"], rates[peer], strict=True))
    shown = ", ".join(f"{name} {rate:,.0f} rows/s" for name, rate in medians.items())
    print(f"{store.engine.dialect.name}: {shown}; kairos / {peer} = {ratio:.2f} (goal {least})")
    return {"rows_per_s": medians, "peer": peer, "ratio": ratio, "goal": least, "all_rows_per_s": rates}


@contextmanager
def database(server: str) -> Iterator[Store]:
    """An empty PostgreSQL database, removed at the end."""
    name = f"kairos_ingest_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        store = Store(make_url(server).set(database=name).render_as_string(hide_password=False))
        try:
            yield store
        finally:
            store.close()
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--postgresql", default="postgresql://postgres@127.0.0.1/postgres", help="a server to use")
    server = parser.parse_args().postgresql
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/kairos.db")
        upgrade(store)
        results["sqlite"] = measured(store, ("core", 0.8))
        store.close()
    with database(server) as store:
        upgrade(store)
        results["postgresql"] = measured(store, ("copy", 0.6))
    made = meta("python benchmarks/ingest.py") | {"rows": ROWS, "batch_rows": BATCH_ROWS}
    path = Path(__file__).parent / "results" / "ingest.json"
    path.write_text(json.dumps({"meta": made, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
