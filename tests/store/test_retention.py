"""What is old goes in pages and leaves exact sums; what is to be kept stays; size is rate times days."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from command_line import kairos
from serving import CONFIG
from sqlalchemy import Connection, Row, func, insert, select, text, update
from store.rows import add, documented, made_requests, made_steps, request_row, step_row, used_bytes

from kairos.scheduler_core.config import Retention
from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.expiry import Expiry
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.store.queries import retention
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.queries.leases import give_back_lease, take_lease
from kairos.scheduler_core.service.store.queries.retention import expiring
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, StepBatch, forget, read_steps
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import (
    Batch,
    Decision,
    Event,
    Request,
    RequestHour,
    Step,
    StepHour,
    Table,
)
from kairos.scheduler_core.telemetry import RequestRow, StepRow

NOW = datetime(2026, 5, 10, 12, 30, tzinfo=UTC)
KEPT = Retention(steps_days=30, requests_days=30)


def stored(store: Store, name: str, rows: list[StepRow] | list[RequestRow], days_ago: float) -> None:
    """A batch that was received so many days before `NOW`."""
    kind: Any = StepBatch if isinstance(rows[0], StepRow) else RequestBatch
    add(store, kind(name, b"0" * 16, rows))
    with store.write() as connection:
        at = NOW - timedelta(days=days_ago)
        connection.execute(update(Batch).where(Batch.batch_id == name).values(received_at=at))


def expire(store: Store, kept: Retention = KEPT, now: datetime = NOW) -> dict[str, int]:
    gone: dict[str, int] = {}
    for table, rows in expiring(store, kept, now):
        gone[table] = gone.get(table, 0) + rows
    return {table: rows for table, rows in gone.items() if rows}


def rows_of(store: Store, table: type[Table]) -> list[Row[Any]]:
    with store.read() as connection:
        return list(connection.execute(select(table.__table__)))


def count(store: Store, table: type[Table]) -> int:
    return len(rows_of(store, table))


def test_old_steps_go_and_leave_the_sums_of_their_hour(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "PAGE_ROWS", 7)
    old = [step_row(latency_ms=10.0 + n, batch_size=3 + n % 2, sum_context_tokens=900) for n in range(40)]
    stored(store, "old", old, days_ago=31)
    stored(store, "new", [step_row()] * 3, days_ago=29)
    gone = expire(store)
    again = expire(store)
    hours = sorted(rows_of(store, StepHour), key=lambda hour: hour.batch_bucket)

    assert (gone, again, count(store, Step)) == ({"steps": 40}, {}, 3)
    assert [(h.hour_at, h.kind, h.batch_bucket, h.new_bucket, h.context_bucket, h.n) for h in hours] == [
        (datetime(2026, 4, 9, 12, tzinfo=UTC), 1, 2, 0, 10, 20),
        (datetime(2026, 4, 9, 12, tzinfo=UTC), 1, 3, 0, 10, 20),
    ]
    for odd, hour in enumerate(hours):
        seconds = [row.latency_ms / 1e3 for row in old[odd::2]]
        assert hour.step_s == pytest.approx(sum(seconds))
        assert hour.step_s_squares == pytest.approx(sum(s * s for s in seconds))


def test_old_requests_leave_what_was_met_and_missed_by_class_and_tenant(store: Store) -> None:
    at = datetime(2026, 4, 1, 10, 59, tzinfo=UTC).timestamp()
    targets = {"ttft_target_ms": 70.0, "tpot_target_ms": 11.0, "arrived_at_s": at}
    met = request_row(**targets, ttft_ms=70.0, tpot_ms=11.0, input_tokens=10, output_tokens=5)
    late = request_row(**targets, ttft_ms=80.0, tpot_ms=10.0, input_tokens=20, output_tokens=5)
    single = request_row(**targets, ttft_ms=10.0, tpot_ms=None, input_tokens=1, output_tokens=1)
    failed = request_row(**targets, ttft_ms=10.0, tpot_ms=None, input_tokens=2, output_tokens=None, status="failed")
    free = request_row(arrived_at_s=at + 60, ttft_ms=90.0, tpot_ms=None, input_tokens=4, output_tokens=7)
    others = request_row(**targets, tenant="", slo_class="fast")
    stored(store, "old", [met, late, single, failed, free, others], days_ago=31)
    stored(store, "new", [request_row()], days_ago=0)
    gone = expire(store)
    first, fast, second = (
        sorted(rows_of(store, RequestHour), key=lambda h: (h.tenant == "", h.hour_at))[:1]
        + sorted(rows_of(store, RequestHour), key=lambda h: (h.tenant != "", h.hour_at))[::2]
    )

    assert gone == {"requests": 6}
    assert (first.hour_at, first.slo_class, first.tenant) == (datetime(2026, 4, 1, 10, tzinfo=UTC), "default", "acme")
    assert (first.n, first.finished, first.input_tokens, first.output_tokens) == (4, 3, 33, 11)
    assert (first.ttft_met, first.ttft_missed, first.tpot_met, first.tpot_missed) == (2, 2, 3, 1)
    assert (first.ttft_n, first.tpot_n) == (4, 2)
    assert (first.ttft_s, first.tpot_s_squares) == pytest.approx((0.17, 0.011**2 + 0.01**2))
    assert (fast.slo_class, fast.tenant, fast.n) == ("fast", "", 1)
    assert (second.hour_at.hour, second.n, second.ttft_met, second.ttft_missed) == (11, 1, 0, 0)


def test_the_newest_row_stays_so_that_its_number_is_not_given_out_again(store: Store) -> None:
    stored(store, "old", [step_row()] * 5, days_ago=99)
    expire(store)
    _, last = read_steps(store)
    stored(store, "next", [step_row(latency_ms=7)], days_ago=0)

    assert (count(store, Step), count(store, Batch)) == (2, 2)
    assert read_steps(store, last)[0][0].step_s.tolist() == [0.007]
    assert expire(store) == {"steps": 1}


def test_a_batch_goes_a_day_after_its_rows(store: Store) -> None:
    for name, days_ago in (("a", 32), ("b", 30.5), ("c", 1)):
        stored(store, name, [step_row()], days_ago=days_ago)
    expire(store)

    assert [row.batch_id for row in rows_of(store, Batch)] == ["b", "c"]
    assert count(store, Step) == 1


def test_what_a_lost_database_broke_off_goes_on_without_a_row_counted_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAGE_ROWS", 10)
    stored(store, "old", [step_row() for _ in range(35)], days_ago=31)
    stored(store, "new", [step_row()], days_ago=0)
    write, pages = store.write, iter(range(99))

    @contextmanager
    def breaking() -> Iterator[Connection]:
        with write() as connection:
            yield connection
            if next(pages) == 2:
                raise StoreError("away")

    monkeypatch.setattr(store, "write", breaking)
    with pytest.raises(StoreError):
        expire(store)
    half = count(store, Step)
    expire(store)

    assert (half, count(store, Step)) == (16, 1)
    assert sum(hour.n for hour in rows_of(store, StepHour)) == 35


def test_two_that_delete_at_once_count_every_row_once(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "PAGE_ROWS", 50)
    for day in range(8):
        stored(store, f"b-{day}", [step_row() for _ in range(100)], days_ago=40 + day)
    stored(store, "new", [step_row()], days_ago=0)
    replicas = [Store(url), Store(url)]
    threads = [Thread(target=expire, args=[replica]) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread, replica in zip(threads, replicas, strict=True):
        thread.join()
        replica.close()

    assert count(store, Step) == 1
    assert sum(hour.n for hour in rows_of(store, StepHour)) == 800


def test_each_table_has_its_own_days_and_null_keeps_for_ever(store: Store) -> None:
    stored(store, "steps", [step_row()] * 2, days_ago=400)
    stored(store, "requests", [request_row()] * 2, days_ago=400)
    with store.write() as connection:
        add_event(connection, "promoted", "p", {})
        connection.execute(update(Event).values(at=NOW - timedelta(days=8)))
        values = {"decision_id": "d", "kept_for": "sampled", "body": b""}
        for days_ago in (1, 3, 5):
            decided_at = NOW - timedelta(days=days_ago)
            connection.execute(insert(Decision).values(decided_at=decided_at, **values))
    nothing = expire(store, Retention.model_validate(dict.fromkeys(Retention.model_fields)))
    some = expire(store, Retention(steps_days=None, requests_days=399, decisions_days=2, events_days=9))

    assert (nothing, some) == ({}, {"requests": 1, "decisions": 2})


def test_sums_go_after_their_own_days(store: Store) -> None:
    stored(store, "old", [request_row()] * 2, days_ago=100)
    expire(store)
    kept, gone = expire(store, KEPT, NOW), expire(store, Retention(rollups_days=99), NOW)

    assert (kept, gone) == ({}, {"request_hours": 1})


def test_a_forgotten_tenant_is_in_no_sum(store: Store) -> None:
    rows = [request_row(tenant=tenant, input_tokens=n) for n, tenant in enumerate(["acme", "globex", "", "acme"])]
    stored(store, "old", [*rows, request_row()], days_ago=50)
    expire(store)
    forget(store, tenants=["acme"])
    some = {hour.tenant: (hour.n, hour.input_tokens) for hour in rows_of(store, RequestHour)}
    forget(store, everyone=True)
    every = {hour.tenant: (hour.n, hour.input_tokens) for hour in rows_of(store, RequestHour)}

    assert some == {"globex": (1, 1), "": (3, 5)}
    assert every == {"": (4, 6)}


def test_the_command_deletes_what_the_configuration_says(store: Store, url: str, tmp_path: Path) -> None:
    add(store, StepBatch("old", b"0" * 16, [step_row()] * 3))
    with store.write() as connection:
        connection.execute(update(Batch).values(received_at=datetime.now(UTC) - timedelta(days=5)))
    path = tmp_path / "kairos.yaml"
    path.write_text(CONFIG.read_text() + f"\nstore: {{url: '{url}', retention: {{steps_days: 4}}}}\n")
    default, configured = kairos("db", "expire", "--url", url), kairos("db", "expire", "--config", path)

    assert (default.code, default.stdout.endswith(": nothing deleted\n")) == (0, True)
    assert configured.stdout.endswith(": 2 of steps deleted\n")


def test_one_replica_deletes_while_another_has_the_lease(store: Store) -> None:
    metrics = Metrics()
    expiry = Expiry(store, Retention(steps_days=1), metrics)
    stored(store, "old", [step_row()] * 3, days_ago=0)
    with store.write() as connection:
        take_lease(connection, "expiry", "another", 60)
    expiry.expire()
    while_led = count(store, Step)
    with store.write() as connection:
        give_back_lease(connection, "expiry", "another")
    expiry.expire()

    assert (while_led, count(store, Step)) == (3, 1)
    assert metrics.registry.get_sample_value("kairos_expired_rows_total", {"table": "steps"}) == 2
    with store.write() as connection:
        assert take_lease(connection, "expiry", "another", 60)


def test_the_background_starts_by_itself_survives_a_database_that_is_away_and_ends_when_told(store: Store) -> None:
    metrics = Metrics()
    with store.write() as connection:
        connection.execute(text("ALTER TABLE leases RENAME TO elsewhere"))
    expiry = Expiry(store, Retention(), metrics)
    for _ in range(2):
        expiry.start()
        expiry.stop()

    assert metrics.registry.get_sample_value("kairos_expiry_failures_total") == 2


@pytest.mark.parametrize("kind", ["steps", "requests"])
def test_the_database_takes_bytes_a_row_times_rows_a_day_times_days_kept(store: Store, kind: str) -> None:
    a_day, days = 2_000, 5
    empty = used_bytes(store)
    for day in range(8):
        expire(store, Retention(steps_days=days, requests_days=days), NOW - timedelta(days=20 - day - 0.5))
        if not store.embedded:  # its own vacuum would, in time
            with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text(f"VACUUM {kind}"))
        rows: Any = made_steps(a_day) if kind == "steps" else made_requests(a_day)
        stored(store, f"day-{day}", rows, days_ago=20 - day)
    taken = used_bytes(store) - empty

    with store.read() as connection:
        table = Step if kind == "steps" else Request
        assert connection.scalar(select(func.count()).select_from(table)) == a_day * days
    assert taken == pytest.approx(documented(store.engine.dialect.name, kind) * a_day * days, rel=0.25)
