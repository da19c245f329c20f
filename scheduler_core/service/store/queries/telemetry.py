"""Telemetry: batches in, steps out for training, ids forgotten."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from sqlalchemy import ColumnElement, Connection, false, func, or_, select, text, true, update

from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConflictError
from kairos.scheduler_core.service.store.queries.decisions import forget_decisions
from kairos.scheduler_core.service.store.queries.reservations import forget_reservations
from kairos.scheduler_core.service.store.queries.retention import forget_in_hours
from kairos.scheduler_core.service.store.queries.upsert import insert_into
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import (
    Batch,
    InstanceSample,
    Recording,
    Request,
    Step,
    Table,
)
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import (
    PHASES,
    REQUEST_STATUSES,
    STEP_KINDS,
    RequestRow,
    SampleRow,
    StepKind,
    StepRow,
    Steps,
)

PAGE_ROWS = 10_000
"""Rows read or changed in one transaction, so that none is long."""

# -- telemetry in ----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of a batch."""

    rows: int
    duplicate: bool
    """It was stored before; `rows` is what was stored then."""


Row = TypeVar("Row", StepRow, RequestRow, SampleRow)


@dataclass(frozen=True, slots=True)
class TelemetryBatch(ABC, Generic[Row]):
    """Rows of one kind that are stored together or not at all."""

    rows_of: ClassVar[str]

    batch_id: str
    digest: bytes
    """16 bytes over what was sent."""
    rows: Sequence[Row]

    @property
    def row_count(self) -> int:
        """How many rows."""
        return len(self.rows)

    def write(self, connection: Connection) -> Stored:
        """As `add_batch`."""
        return add_batch(connection, self)

    @abstractmethod
    def copy_rows(self, connection: Connection, key: int) -> None:
        """Store the rows under the key of their batch."""


class StepBatch(TelemetryBatch[StepRow]):
    """Steps that are stored together or not at all."""

    rows_of = "steps"

    def copy_rows(self, connection: Connection, key: int) -> None:
        """Store the rows under the key of their batch."""
        recordings = _recordings(connection, {_step_recording(row) for row in self.rows})
        _announce_ids(connection)
        now_s = time.time()
        _copy(connection, Step, _STEP_COLUMNS, (_step_values(key, recordings, row, now_s) for row in self.rows))


class RequestBatch(TelemetryBatch[RequestRow]):
    """Requests that are stored together or not at all."""

    rows_of = "requests"

    def copy_rows(self, connection: Connection, key: int) -> None:
        """Store the rows under the key of their batch."""
        recordings = _recordings(connection, {_request_recording(row) for row in self.rows})
        _copy(connection, Request, _REQUEST_COLUMNS, (_request_values(key, recordings, row) for row in self.rows))


class SampleBatch(TelemetryBatch[SampleRow]):
    """Samples of instances that are stored together or not at all."""

    rows_of = "samples"

    def copy_rows(self, connection: Connection, key: int) -> None:
        """Store the rows under the key of their batch."""
        _copy(connection, InstanceSample, _SAMPLE_COLUMNS, (_sample_values(key, row) for row in self.rows))


def add_batch(connection: Connection, batch: TelemetryBatch[Any]) -> Stored:
    """Store a batch, unless one of its id is there.

    Raises:
        ConflictError: one of its id is there, with other content.
    """
    key = _batch_key(connection, batch)
    if isinstance(key, Stored):
        return key
    batch.copy_rows(connection, key)
    return Stored(batch.row_count, duplicate=False)


RecordingKey = tuple[str, str, str, int, int, str, str]
"""gpu, model, precision, tp, ep, engine, run."""


def _batch_key(connection: Connection, batch: TelemetryBatch[Any]) -> int | Stored:
    """The key of a new batch, or what was stored of it before."""
    values = {"digest": batch.digest, "received_at": datetime.now(UTC), "stored": len(batch.rows)}
    new = insert_into(connection, Batch).values(rows_of=batch.rows_of, batch_id=batch.batch_id, **values)
    key = connection.scalar(new.on_conflict_do_nothing().returning(Batch.id))
    if key is not None:
        return int(key)
    same_id = (Batch.rows_of == batch.rows_of) & (Batch.batch_id == batch.batch_id)
    digest, stored = connection.execute(select(Batch.digest, Batch.stored).where(same_id)).one()
    if digest != batch.digest:
        raise ConflictError(f"batch '{batch.batch_id}' was stored with other content; send this under another id")
    return Stored(stored, duplicate=True)


def _recordings(connection: Connection, wanted: Iterable[RecordingKey]) -> dict[RecordingKey, int]:
    """Ids of recordings, made where they are new; in one order, so that two replicas do not wait for each other."""
    ids: dict[RecordingKey, int] = {}
    for key in sorted(wanted):
        values = dict(zip(_RECORDING_COLUMNS, key, strict=True))
        find = select(Recording.id).filter_by(**values)
        if (found := connection.scalar(find)) is None:
            connection.execute(insert_into(connection, Recording).values(**values).on_conflict_do_nothing())
            found = connection.scalars(find).one()
        ids[key] = found
    return ids


_RECORDING_COLUMNS = ("gpu", "model", "precision", "tp", "ep", "engine", "run")


def _step_recording(row: StepRow) -> RecordingKey:
    return row.gpu, row.model, row.precision, row.tp, row.ep, row.engine, row.run


def _request_recording(row: RequestRow) -> RecordingKey:
    return row.gpu, row.model, row.precision, row.tp, row.ep, row.engine, row.trace


_STEP_COLUMNS = (
    *("batch", "step_s", "cached_tokens", "sum_context_tokens", "recording", "n_requests", "new_tokens", "batch_size"),
    *("kind", "prev_phase", "noisy", "ended_at_s"),
)
_KIND_PLACE = {kind: place for place, kind in enumerate(STEP_KINDS)}
_PHASE_PLACE = {phase: place for place, phase in enumerate(PHASES)}


def _step_values(batch: int, recordings: dict[RecordingKey, int], row: StepRow, now_s: float) -> tuple[Any, ...]:
    return (
        batch,
        row.latency_ms / 1e3,
        row.cached_tokens,
        row.sum_context_tokens,
        recordings[_step_recording(row)],
        row.n_requests,
        row.new_tokens,
        row.batch_size,
        _KIND_PLACE[row.step_kind],
        _PHASE_PLACE[row.prev_phase],
        "noisy" in row.flag.split(";"),
        now_s if row.ended_at_s is None else row.ended_at_s,
    )


_REQUEST_COLUMNS = (
    *("batch", "recording", "request_id", "tenant", "slo_class", "input_tokens", "output_tokens", "prefix_hit_ratio"),
    *("kv_cache_usage", "requests_running", "requests_waiting", "prefill_tokens_in_flight"),
    *("decode_tokens_in_flight", "model_version", "predicted_ttft_s", "predicted_tpot_s", "ttft_s", "tpot_s"),
    *("arrived_at_s", "status", "ttft_target_s", "tpot_target_s", "wait_s", "strategy", "session", "pool"),
    *("prefill_instance", "decode_instance"),
)
_STATUS_PLACE = {status: place for place, status in enumerate(REQUEST_STATUSES)}


def _request_values(batch: int, recordings: dict[RecordingKey, int], row: RequestRow) -> tuple[Any, ...]:
    return (
        batch,
        recordings[_request_recording(row)],
        row.request_id or None,
        row.tenant or None,
        row.slo_class,
        row.input_tokens,
        row.output_tokens,
        row.prefix_hit_ratio,
        row.kv_cache_usage,
        row.requests_running,
        row.requests_waiting,
        row.prefill_tokens_in_flight,
        row.decode_tokens_in_flight,
        row.model_version,
        _seconds(row.predicted_ttft_ms),
        _seconds(row.predicted_tpot_ms),
        _seconds(row.ttft_ms),
        _seconds(row.tpot_ms),
        row.arrived_at_s,
        _STATUS_PLACE[row.status],
        _seconds(row.ttft_target_ms),
        _seconds(row.tpot_target_ms),
        _seconds(row.wait_ms),
        row.strategy or None,
        row.session or None,
        row.pool,
        row.prefill_instance or None,
        row.decode_instance or None,
    )


_SAMPLE_SECONDS = ("ttft", "itl", "e2e", "decode_step")
_SAMPLE_SAME = tuple(name for name in SampleRow.__struct_fields__ if name.removesuffix("_ms") not in _SAMPLE_SECONDS)
_SAMPLE_COLUMNS = ("batch", *_SAMPLE_SAME, *(f"{name}_s" for name in _SAMPLE_SECONDS))
_SAMPLE_MS = tuple(f"{name}_ms" for name in _SAMPLE_SECONDS)


def _sample_values(batch: int, row: SampleRow) -> tuple[Any, ...]:
    seconds = (_seconds(getattr(row, name)) for name in _SAMPLE_MS)
    return batch, *(getattr(row, name) for name in _SAMPLE_SAME), *seconds


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _copy(connection: Connection, table: type[Table], columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Many rows the fastest way: COPY, or one prepared statement of SQLite's."""
    names = ", ".join(columns)
    cursor: Any = connection.connection.cursor()  # the driver's own
    if connection.dialect.name == "postgresql":
        with cursor.copy(f"COPY {table.__tablename__} ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        places = ", ".join("?" * len(columns))
        cursor.executemany(f"INSERT INTO {table.__tablename__} ({names}) VALUES ({places})", rows)
    cursor.close()


# -- telemetry out ---------------------------------------------------------------------------------------------------


def read_steps(
    store: Store, after: int = 0, since: datetime | None = None, most: int | None = None
) -> tuple[list[Steps], int]:
    """All steps with an id above `after`, by profile and kind, in the order they came; and the id to go on from.

    With `since`, only those that were received then or later; with `most`, only those of the next so many ids. Read in
    short transactions, so that writers never wait for a training; steps of a transaction that runs still are left to
    the next call. `run` is the recording's id.
    """
    pages: dict[tuple[int, int], list[FloatArray]] = {}
    with store.read() as connection:
        settled = _settled_id(connection)
        last = max(after, settled if most is None else min(settled, after + most))
        wanted = (Step.id <= last) & _received_since(connection, since)
    while True:
        with store.read() as connection:
            rows = connection.execute(
                select(*_STEPS_OUT).where(Step.id > after, wanted).order_by(Step.id).limit(PAGE_ROWS)
            ).all()
        if not rows:
            break
        after = rows[-1].id
        page = np.array([tuple(row) for row in rows], np.float64)
        places = page[:, 1] * len(STEP_KINDS) + page[:, 2]  # recording and kind in one
        for place in np.unique(places):
            recording, kind = divmod(int(place), len(STEP_KINDS))
            pages.setdefault((recording, kind), []).append(page[places == place])
    with store.read() as connection:
        profiles = {r.id: Profile(*r[1:7]) for r in connection.execute(select(Recording.__table__))}
    groups: dict[tuple[Profile, StepKind], list[FloatArray]] = {}
    for (recording, kind), parts in pages.items():
        groups.setdefault((profiles[recording], STEP_KINDS[kind]), []).extend(parts)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0].profile_id, item[0][1]))
    return [_steps_of(profile, kind, np.concatenate(parts)) for (profile, kind), parts in ordered], last


def _received_since(connection: Connection, since: datetime | None) -> ColumnElement[bool]:
    """The condition on steps; batches are numbered as they come."""
    if since is None:
        return true()
    first = connection.scalar(select(func.min(Batch.id)).where(Batch.rows_of == "steps", Batch.received_at >= since))
    return false() if first is None else Step.batch >= first


# PostgreSQL gives out ids before it is known who commits first, so a lower id may appear after a higher one was read.
# Hence every transaction that stores steps says, as the number of an advisory lock, above which id its own will be; a
# reader goes no further than the lowest that is held. The lock ends with the transaction, and holds up nobody.
_ANNOUNCED = 1 << 62
_ANNOUNCE = text(
    f"SELECT pg_advisory_xact_lock_shared({_ANNOUNCED} + last_value - CASE WHEN is_called THEN 0 ELSE 1 END) "
    "FROM steps_id_seq"
)
_LOWEST_ANNOUNCED = text(
    f"""SELECT min(number) - {_ANNOUNCED}
    FROM (SELECT (classid::bigint << 32) | objid::bigint AS number FROM pg_locks
          WHERE locktype = 'advisory' AND mode = 'ShareLock' AND objsubid = 1
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS held
    WHERE number >= {_ANNOUNCED}"""
)


def _announce_ids(connection: Connection) -> None:
    """Say which ids the steps will have that this transaction stores. SQLite has one writer at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(_ANNOUNCE)


def _settled_id(connection: Connection) -> int:
    """The highest id of a step below which no other can appear."""
    highest = connection.scalar(select(func.max(Step.id))) or 0  # before the locks: who is not in them has committed
    lowest = connection.scalar(_LOWEST_ANNOUNCED) if connection.dialect.name == "postgresql" else None
    return highest if lowest is None else min(highest, lowest)


_NUMBERS = ("step_s", "n_requests", "new_tokens", "cached_tokens", "batch_size", "sum_context_tokens")
_STEPS_OUT = (
    *(Step.id, Step.recording, Step.kind, Step.prev_phase, Step.noisy, Step.ended_at_s),
    *(getattr(Step, name) for name in _NUMBERS),
)


def _steps_of(profile: Profile, kind: StepKind, rows: FloatArray) -> Steps:
    """Steps from (n, 12) numbers in the order of `_STEPS_OUT`, oldest first."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    columns = {column.key: rows[:, place] for place, column in enumerate(_STEPS_OUT)}
    return Steps(
        profile,
        kind,
        **{name: columns[name] for name in _NUMBERS},
        prev_phase=columns["prev_phase"].astype(np.int64),
        run=columns["recording"].astype(np.int64),
        noisy=columns["noisy"] > 0,
        ended_at_s=columns["ended_at_s"],
    )


def forget(store: Store, *, tenants: Sequence[str] = (), requests: Sequence[str] = (), everyone: bool = False) -> int:
    """Delete tenant and request ids of the requests of these tenants, of these requests, or of all; how many rows.

    Those of decisions and of reservations that have ended go too.
    What is left tells lengths and times and of whom no longer. SQLite overwrites what it deletes; PostgreSQL does with
    its next vacuum.
    """
    forget_decisions(store, tenants=tenants, requests=requests, everyone=everyone)
    forget_reservations(store, tenants=tenants, requests=requests, everyone=everyone)
    named: ColumnElement[bool] = or_(Request.tenant.in_(tenants), Request.request_id.in_(requests))
    if everyone:
        named = or_(Request.tenant.is_not(None), Request.request_id.is_not(None))
    page = select(Request.id).where(named).limit(PAGE_ROWS)
    total = 0
    while True:
        with store.write() as connection:
            changed = connection.execute(
                update(Request).where(Request.id.in_(page)).values(tenant=None, request_id=None)
            ).rowcount
        total += changed
        if not changed:
            with store.write() as connection:
                forget_in_hours(connection, None if everyone else tenants)
            store.shrink_log()
            return total
