"""What is acknowledged stays, what fails leaves nothing, what is full says so; forgetting, models, strategies, size."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest
from command_line import kairos
from fastapi import FastAPI
from service.snapshots import call, settings_of
from sqlalchemy import Connection, func, select, text, update
from store.rows import add, decode_step, documented, made_requests, made_steps, request_row, step_row, used_bytes

from kairos.scheduler_core.errors import BusyError, KairosError, StoreError, UnknownNameError
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.problems import on_kairos_error
from kairos.scheduler_core.service.routes.telemetry import telemetry_routes
from kairos.scheduler_core.service.store import session
from kairos.scheduler_core.service.store import writer as writer_module
from kairos.scheduler_core.service.store.queries import models, strategies, telemetry
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, StepBatch, Stored, add_batch, read_steps
from kairos.scheduler_core.service.store.revisions import upgrade
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Batch, Request, Step
from kairos.scheduler_core.service.store.writer import Writer
from kairos.scheduler_core.telemetry import StepRow

ROOT = Path(__file__).parents[2]


def steps(batch_id: str, *rows: StepRow) -> StepBatch:
    return StepBatch(batch_id, b"0" * 16, rows or [step_row()])


def count(store: Store, table: type[Step] | type[Batch] = Step) -> int:
    with store.read() as connection:
        return connection.scalars(select(func.count()).select_from(table)).one()


INGEST = """
import sys
from store.rows import step_row
from kairos.scheduler_core.service.store.queries.telemetry import StepBatch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer

writer = Writer(Store(sys.argv[1]), 10**6)
for number in range(10**6):
    writer.put(StepBatch(f"b-{number}", b"0" * 16, [step_row(new_tokens=0)] * 50)).result()
    print(number, flush=True)
"""


def test_a_kill_in_the_middle_of_ingest_loses_nothing_acknowledged_and_leaves_no_half_batch(
    store: Store, url: str
) -> None:
    path = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
    process = subprocess.Popen([sys.executable, "-c", path + INGEST, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(30):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    acknowledged = 30 + len([line for line in process.stdout.read().splitlines() if line.isdecimal()])
    process.wait()

    with store.read() as connection:
        batches = set(connection.scalars(select(Batch.batch_id)))
    assert batches >= {f"b-{number}" for number in range(acknowledged)}
    assert count(store) == 50 * len(batches)


def test_a_batch_that_fails_half_way_leaves_nothing(store: Store) -> None:
    broken = StepRow(gpu="H100", model="m", latency_ms=None, batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        add(store, steps("b", step_row(), broken))

    assert (count(store), count(store, Batch)) == (0, 0)


def test_a_full_disk_is_said_and_nothing_is_half_written(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/kairos.db")
    upgrade(store)
    with store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 3}")
    writer = Writer(store, 10**6)

    failed = writer.put(steps("large", *[step_row()] * 20_000))
    with pytest.raises(StoreError, match=r"database or disk is full; nothing was written"):
        failed.result()

    assert count(store) == 0
    assert writer.put(steps("small")).result() == Stored(1, duplicate=False)
    writer.drain()


def test_a_writer_that_is_drained_has_stored_what_waited_and_begins_anew_when_asked(store: Store) -> None:
    writer = Writer(store, 10**6)
    futures = [writer.put(steps(f"b-{n}")) for n in range(20)]
    writer.drain()
    done = [future.done() for future in futures]

    assert done == [True] * 20
    assert writer.put(steps("later")).result() == Stored(1, duplicate=False)
    writer.drain()
    writer.drain()
    assert count(store) == 21


def test_a_batch_whose_sender_left_before_its_turn_harms_no_other(store: Store) -> None:
    writer = Writer(store, 10**6)
    with store.write():  # the writer waits at SQLite; at PostgreSQL it may be faster than we are
        futures = [writer.put(steps(f"b-{n}")) for n in range(3)]
        cancelled = futures[2].cancel()
    writer.drain()

    assert [future.result().rows for future in futures[:2]] == [1, 1]
    assert count(store) == (2 if cancelled else 3)


class Slow(Store):
    """A database that does not get on until it is let."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go_on, self.busy = Event(), Event()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        self.busy.set()
        self.go_on.wait(20)
        with super().write() as connection:
            yield connection


def test_a_full_queue_is_answered_429_with_when_to_come_back_and_loses_nothing(store: Store, url: str) -> None:
    slow = Slow(url)
    writer = Writer(slow, most_rows=100)
    futures: list[Future[Stored]] = [writer.put(steps("first", *[step_row()] * 60))]
    assert slow.busy.wait(5)
    futures.append(writer.put(steps("second", *[step_row()] * 40)))
    with pytest.raises(BusyError, match=r"100 rows of telemetry wait to be stored, and 1 more .* send it again in 1 s"):
        writer.put(steps("third"))
    slow.go_on.set()

    assert [future.result().rows for future in futures] == [60, 40]
    assert writer.put(steps("third")).result().rows == 1
    writer.drain()
    assert count(store) == 101


def test_a_full_queue_is_429_over_http(store: Store) -> None:
    url = store.engine.url.render_as_string(hide_password=False)
    app = create_app(settings_of(store={"url": url, "queued_rows": 1}))
    answers: list[int] = []
    retry: list[str] = []

    def post() -> None:
        answer = call(app, "POST", "/telemetry/steps", json=[decode_step()])
        answers.append(answer.status_code)
        retry.extend([answer.headers["retry-after"]] if answer.status_code == 429 else [])

    with store.write() as connection:
        if not store.embedded:
            connection.execute(text("LOCK TABLE telemetry_batches"))
        threads = [Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join(0.5)
    for thread in threads:
        thread.join()

    assert sorted(answers) == [200, 429, 429, 429]
    assert all(int(seconds) >= 1 for seconds in retry)
    assert count(store) == 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_database_that_goes_away_refuses_telemetry_and_decisions_go_on(store: Store, url: str, server: str) -> None:
    app = create_app(settings_of(store={"url": url}))
    before = call(app, "POST", "/telemetry/steps", json=[decode_step()])
    with psycopg.connect(server, autocommit=True) as connection:
        name = store.engine.url.database
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        away = call(app, "POST", "/telemetry/steps", json=[decode_step()])
        readiness = call(app, "GET", "/readyz").json()
        decision = call(app, "POST", "/schedule", json={"instances": []})
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    again = call(app, "POST", "/telemetry/steps", json=[decode_step()])

    assert [answer.status_code for answer in (before, away, decision, again)] == [200, 503, 200, 200]
    assert "nothing was written" in away.json()["detail"]
    assert (readiness["status"], readiness["database"]) == ("ready", "away")
    assert count(store) == 2


@contextmanager
def away(store: Store, server: str) -> Iterator[None]:
    """The database answers nobody: PostgreSQL ends its connections and takes none, SQLite is locked."""
    if store.embedded:
        other = sqlite3.connect(str(store.engine.url.database))
        other.execute("BEGIN IMMEDIATE")
        yield
        other.close()
        return
    with psycopg.connect(server, autocommit=True) as connection:
        name = store.engine.url.database
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        yield
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


@pytest.fixture
def hasty(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same database, by one who does not wait long."""
    monkeypatch.setattr(session, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(writer_module, "RETRY_S", 0.05)
    hasty = Store(url)
    yield hasty
    hasty.close()


def test_what_is_kept_while_the_database_is_away_is_written_when_it_answers_again(hasty: Store, server: str) -> None:
    writer = Writer(hasty, most_rows=50)
    with away(hasty, server):
        kept = [writer.put(steps(f"b-{n}", *[step_row()] * 20), keep=True) for n in range(2)]
        with pytest.raises(StoreError, match="nothing was written"):
            writer.put(steps("not kept")).result(20)
        with pytest.raises(BusyError, match="40 rows of telemetry wait"):
            writer.put(steps("too many", *[step_row()] * 20), keep=True)
        done, waiting = [future.done() for future in kept], writer.waiting_rows

    assert (done, waiting) == ([False, False], 40)
    assert [future.result(20) for future in kept] == [Stored(20, duplicate=False)] * 2
    writer.drain()
    assert (count(hasty), writer.waiting_rows) == (40, 0)


def test_what_is_kept_until_the_end_fails_then(hasty: Store, server: str) -> None:
    writer = Writer(hasty, most_rows=50)
    with away(hasty, server):
        kept = writer.put(steps("b"), keep=True)
        writer.drain()

    with pytest.raises(StoreError, match="did not answer until the end"):
        kept.result(0)
    assert (count(hasty), writer.waiting_rows) == (0, 0)


def test_one_batch_that_the_disk_has_no_room_for_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "RETRY_S", 0.05)
    store = Store(f"sqlite:///{tmp_path}/small.db")
    upgrade(store)
    with store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 3}")
    writer = Writer(store, 10**6)
    large = writer.put(steps("large", *[step_row()] * 20_000), keep=True)
    small = writer.put(steps("small"), keep=True)

    assert small.result(20) == Stored(1, duplicate=False)
    assert not large.done()
    writer.drain()
    assert isinstance(large.exception(0), StoreError)


def counted(metrics: Metrics, outcome: str) -> float | None:
    return metrics.registry.get_sample_value("kairos_telemetry_rows_total", {"kind": "steps", "outcome": outcome})


def test_who_asks_to_be_answered_at_once_is_and_every_row_is_counted(hasty: Store, server: str) -> None:
    writer, metrics = Writer(hasty, most_rows=3), Metrics()
    app = FastAPI(routes=telemetry_routes(writer, metrics, 10**6))
    app.add_exception_handler(KairosError, on_kairos_error)

    def post(batch_id: str, rows: int, prefer: str = "respond-async; x, wait=1") -> tuple[int, int | None]:
        body = {"batch_id": batch_id, "rows": [decode_step()] * rows}
        answer = call(app, "POST", "/telemetry/steps", json=body, headers={"prefer": prefer})
        return answer.status_code, answer.json().get("buffered")

    with away(hasty, server):
        answers = [post("a", 2), post("b", 1, prefer="return=minimal"), post("c", 2)]
        waiting = metrics.registry.get_sample_value("kairos_telemetry_queue_rows")
    writer.drain()

    assert answers == [(202, 2), (503, None), (429, None)]
    assert waiting == 2
    assert [counted(metrics, outcome) for outcome in ("stored", "refused", "dropped")] == [2, 3, None]
    assert count(hasty) == 2


def test_two_replicas_store_the_same_batch_once(store: Store, url: str) -> None:
    other = Store(url)
    futures = [
        writer.put(steps(f"b-{n}", step_row(run=f"run-{n % 7}"), step_row(run=f"run-{n % 3}")))
        for writer in (Writer(store, 10**6), Writer(other, 10**6))
        for n in range(40)
    ]
    stored = [future.result() for future in futures]
    other.close()

    assert sum(s.duplicate for s in stored) == 40
    assert count(store) == 80


def test_reading_goes_by_pages_and_gives_all_in_the_order_they_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [step_row(latency_ms=float(n + 1), run=f"r{n % 3}") for n in range(250)]
    add(store, steps("a", *rows[:100]), steps("b", *rows[100:]))
    whole, last = read_steps(store)
    monkeypatch.setattr(telemetry, "PAGE_ROWS", 7)
    paged, _ = read_steps(store)

    assert whole[0].step_s.tolist() == paged[0].step_s.tolist() == [(n + 1.0) / 1e3 for n in range(250)]
    assert read_steps(store, after=last - 3)[0][0].step_s.tolist() == [0.248, 0.249, 0.25]


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_steps_that_are_committed_late_are_read_by_the_next_call(store: Store) -> None:
    with store.write() as slow:
        add_batch(slow, steps("slow", step_row(latency_ms=1, run="slow"), step_row(latency_ms=2, run="slow")))
        add(store, steps("fast", step_row(latency_ms=3)))
        before, last = read_steps(store)
    after, end = read_steps(store, last)

    assert (before, last) == ([], 0)
    assert (after[0].step_s.tolist(), end) == ([0.001, 0.002, 0.003], 3)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_what_was_stored_before_a_transaction_that_runs_still_is_read(store: Store) -> None:
    add(store, steps("first", step_row(latency_ms=1), step_row(latency_ms=2)))
    with store.write() as slow:
        add_batch(slow, steps("slow", step_row(latency_ms=3, run="slow")))
        add(store, steps("fast", step_row(latency_ms=4)))
        (before,), last = read_steps(store)
    (after,), _ = read_steps(store, last)

    assert (before.step_s.tolist(), last) == ([0.001, 0.002], 2)
    assert after.step_s.tolist() == [0.003, 0.004]


def test_steps_are_read_since_a_time(store: Store) -> None:
    add(store, steps("old", step_row(latency_ms=1)), steps("new", step_row(latency_ms=2)))
    now = datetime.now(UTC)
    with store.write() as connection:
        connection.execute(update(Batch).where(Batch.batch_id == "old").values(received_at=now - timedelta(days=3)))
    (recent,), last = read_steps(store, since=now - timedelta(days=1))
    both = read_steps(store, since=now - timedelta(days=4))[0][0]
    none, _ = read_steps(store, since=now + timedelta(days=1))

    assert (recent.step_s.tolist(), both.step_s.tolist(), none) == ([0.002], [0.001, 0.002], [])
    assert last == 2


# -- forgetting ------------------------------------------------------------------------------------------------------


def ids(store: Store) -> list[tuple[str | None, str | None]]:
    with store.read() as connection:
        return [
            (r[0], r[1]) for r in connection.execute(select(Request.tenant, Request.request_id).order_by(Request.id))
        ]


@pytest.fixture
def three(store: Store) -> Store:
    rows = [
        request_row(request_id="r-1"),
        request_row(request_id="r-2"),
        request_row(tenant="globex", request_id="r-3"),
    ]
    add(store, RequestBatch("b", b"0" * 16, rows))
    return store


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--tenant", "acme"], [(None, None), (None, None), ("globex", "r-3")]),
        (["--request", "r-2"], [("acme", "r-1"), (None, None), ("globex", "r-3")]),
        (["--tenant", "globex", "--request", "r-1"], [(None, None), ("acme", "r-2"), (None, None)]),
        (["--all"], [(None, None)] * 3),
        (["--tenant", "nobody"], [("acme", "r-1"), ("acme", "r-2"), ("globex", "r-3")]),
    ],
)
def test_what_is_named_is_forgotten_and_its_numbers_stay(
    three: Store, url: str, options: list[str], left: list[tuple[str | None, str | None]]
) -> None:
    ended = kairos("db", "forget", "--url", url, *options)

    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.endswith(f": {left.count((None, None))} requests are of nobody now\n")
    assert ids(three) == left
    with three.read() as connection:
        assert connection.scalars(select(Request.ttft_s)).all() == [0.0645] * 3


def test_forgetting_needs_a_name(url: str) -> None:
    ended = kairos("db", "forget", "--url", url)

    assert (ended.code, ended.stderr) == (
        2, "kairos: nothing is named to be forgotten; give --tenant, --request or --all\n",
    )  # fmt: skip


def test_what_sqlite_forgot_is_in_no_byte_of_its_files(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kairos.db"
    kairos("db", "upgrade", "--url", url)
    store = Store(url)
    rows = [request_row(tenant=f"marker-{n}", request_id=f"marker-{n}") for n in range(500)]
    add(store, RequestBatch("b", b"0" * 16, rows))
    before = b"marker-77" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    telemetry.forget(store, everyone=True)

    assert before
    assert b"marker-" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


# -- models and strategies -------------------------------------------------------------------------------------------


def test_a_model_serves_once_promoted_and_a_rollback_is_one_more_promotion(store: Store) -> None:
    with store.write() as connection:
        versions = [models.add_model(connection, "p", "hash", 7, content) for content in (b"one", b"two")]
        models.add_model(connection, "q", "hash", 7, b"other")
        nobody = models.serving_models(connection)
        generations = [models.promote_model(connection, "p", version, "test") for version in (1, 2, 1)]
        models.promote_model(connection, "q", 1, "test")
    with store.read() as connection:
        serving = models.serving_models(connection)
        content = models.model_artifact(connection, "p", serving["p"].version)

    assert (versions, nobody, generations) == ([1, 2], {}, [1, 2, 3])
    assert {name: (m.version, m.generation) for name, m in serving.items()} == {"p": (1, 3), "q": (1, 4)}
    assert (content, serving["p"].trained_at.utcoffset().total_seconds()) == (b"one", 0)  # type: ignore[union-attr]


def test_a_strategy_is_versioned_and_the_last_activation_holds(store: Store) -> None:
    with store.write() as connection:
        nothing = strategies.active_strategy(connection)
        for h in (0.8, 0.9):
            strategies.add_strategy(connection, "mine", {"decode": {"name": "slack", "h": h}})
        generations = [strategies.activate_strategy(connection, "mine", version) for version in (1, 2, 1)]
    with store.read() as connection:
        active = strategies.active_strategy(connection)

    assert (nothing, generations) == (None, [1, 2, 3])
    assert active == ("mine", 1, 3, {"decode": {"name": "slack", "h": 0.8}})


def test_generations_rise_one_by_one_when_replicas_activate_at_once(store: Store, url: str) -> None:
    with store.write() as connection:
        strategies.add_strategy(connection, "mine", {})
    seen: list[int] = []

    def activate(replica: Store) -> None:
        for _ in range(10):
            with replica.write() as connection:
                generation = strategies.activate_strategy(connection, "mine", 1)
            seen.append(generation)

    replicas = [Store(url), Store(url)]
    threads = [Thread(target=activate, args=[replica]) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread, replica in zip(threads, replicas, strict=True):
        thread.join()
        replica.close()

    assert sorted(seen) == list(range(1, 21))


def test_a_version_that_is_not_there_is_named_with_those_that_are(store: Store) -> None:
    with store.write() as connection:
        strategies.add_strategy(connection, "mine", {})

        with pytest.raises(UnknownNameError, match=r"unknown strategy version 'mine 3'.*Installed: mine 1"):
            strategies.activate_strategy(connection, "mine", 3)
        with pytest.raises(UnknownNameError, match="unknown model version 'p 1'"):
            models.promote_model(connection, "p", 1, "test")


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["steps", "requests"])
def test_a_row_takes_the_documented_bytes(store: Store, rows: str) -> None:
    n = 20_000
    before = used_bytes(store)
    add(store, steps("b", *made_steps(n)) if rows == "steps" else RequestBatch("b", b"0" * 16, made_requests(n)))
    a_row = (used_bytes(store) - before) / n

    assert a_row == pytest.approx(documented(store.engine.dialect.name, rows), rel=0.25)


def test_sqlite_is_as_durable_as_is_said(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/kairos.db")
    with store.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("journal_mode", "synchronous")
        ]
        other = sqlite3.connect(tmp_path / "kairos.db", timeout=0)
        other.execute("BEGIN IMMEDIATE")  # one who reads holds nobody up
        other.close()

    assert settings == ["wal", 2]
