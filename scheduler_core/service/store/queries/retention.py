"""What is older than it is to be kept goes, page by page; of steps and requests a sum by the hour stays.

A page is summed and deleted in one transaction, so nothing is counted twice or not at all. The newest row of each table
stays: SQLite would give its number to the next one, and who reads from an id on would miss that.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, Row, delete, func, select
from sqlalchemy.orm import InstrumentedAttribute

from kairos.scheduler_core import slo
from kairos.scheduler_core.config import Retention
from kairos.scheduler_core.service.store.queries.upsert import insert_into
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import (
    Batch,
    Decision,
    Event,
    InstanceSample,
    Request,
    RequestHour,
    Step,
    StepHour,
)
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import REQUEST_STATUSES

PAGE_ROWS = 10_000
"""Rows of a transaction, so that none is long."""

Key = TypeVar("Key", bound=tuple[Hashable, ...])


def expiring(store: Store, kept: Retention, now: datetime) -> Iterator[tuple[str, int]]:
    """Delete what is old; after each transaction, the table and how many rows went from it.

    Raises:
        StoreError: the database is away; what went before is gone and summed.
    """
    for table, days, page in (
        (Step, kept.steps_days, _expire_steps),
        (Request, kept.requests_days, _expire_requests),
        (InstanceSample, kept.samples_days, _expire_samples),
        (Decision, kept.decisions_days, _dated(Decision.decided_at)),
        (Event, kept.events_days, _dated(Event.at)),
        (StepHour, kept.rollups_days, _dated(StepHour.hour_at)),
        (RequestHour, kept.rollups_days, _dated(RequestHour.hour_at)),
    ):
        more = days is not None
        while more:
            with store.write() as connection:
                rows, more = page(connection, now - timedelta(days=days or 0))
            yield table.__tablename__, rows


Page = Callable[[Connection, datetime], tuple[int, bool]]
"""Deletes a page of what is older; how many rows, and whether there may be more."""


def _dated(column: InstrumentedAttribute[datetime]) -> Page:
    """For a table whose rows have a date that is indexed."""
    table = column.class_

    def page(connection: Connection, before: datetime) -> tuple[int, bool]:
        old = select(column).where(column < before).order_by(column)
        last = connection.scalar(old.offset(PAGE_ROWS - 1).limit(1))
        condition = column < before if last is None else column <= last
        return connection.execute(delete(table).where(condition)).rowcount, last is not None

    return page


# -- telemetry -------------------------------------------------------------------------------------------------------

Telemetry = type[Step] | type[Request] | type[InstanceSample]


def _expire_steps(connection: Connection, before: datetime) -> tuple[int, bool]:
    rows = _oldest(connection, Step, before)
    add_step_hours(connection, rows)
    return _delete(connection, Step, "steps", rows, before)


def _expire_requests(connection: Connection, before: datetime) -> tuple[int, bool]:
    rows = _oldest(connection, Request, before)
    add_request_hours(connection, rows)
    return _delete(connection, Request, "requests", rows, before)


def _expire_samples(connection: Connection, before: datetime) -> tuple[int, bool]:
    return _delete(connection, InstanceSample, "samples", _oldest(connection, InstanceSample, before), before)


def _oldest(connection: Connection, table: Telemetry, before: datetime) -> Sequence[Row[Any]]:
    """The first rows by id, up to the first one that stays: they were received in about the order of their ids."""
    newest = select(func.max(table.id)).scalar_subquery()
    page = (
        select(table.__table__, Batch.received_at)
        .join(Batch, Batch.id == table.batch)
        .where(table.id < newest)
        .order_by(table.id)
        .limit(PAGE_ROWS)
        .with_for_update(of=table)  # PostgreSQL: another one that deletes waits, and then finds them gone
    )
    return list(takewhile(lambda row: row.received_at < before, connection.execute(page)))


def _delete(
    connection: Connection, table: Telemetry, rows_of: str, rows: Sequence[Row[Any]], before: datetime
) -> tuple[int, bool]:
    """Delete rows that follow each other by id; at the end the batches that nothing is left of."""
    if rows:
        connection.execute(delete(table).where(table.id.between(rows[0].id, rows[-1].id)))
    if len(rows) == PAGE_ROWS:
        return len(rows), True
    newest = select(table.batch).order_by(table.id.desc()).limit(1).scalar_subquery()
    # a day more than their rows, which are not quite in the order of their batches
    old = (Batch.rows_of == rows_of) & (Batch.received_at < before - timedelta(days=1))
    connection.execute(delete(Batch).where(old, Batch.id < func.coalesce(newest, 0)))
    return len(rows), False


# -- sums by the hour ------------------------------------------------------------------------------------------------


def add_step_hours(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    """Add steps (with `received_at`) to the sums of their hours."""
    keys = [
        (
            _hour(row.received_at),
            row.recording,
            row.kind,
            row.batch_size.bit_length(),
            row.new_tokens.bit_length(),
            (row.cached_tokens + row.sum_context_tokens).bit_length(),
        )
        for row in rows
    ]
    step_s = np.array([row.step_s for row in rows])
    _add(connection, StepHour, _summed(keys, np.column_stack((np.ones(len(rows)), step_s, step_s**2))))


def add_request_hours(connection: Connection, rows: Sequence[Row[Any]]) -> None:
    """Add requests (with `received_at`) to the sums of their hours."""
    keys = [
        (
            _hour(row.received_at if row.arrived_at_s is None else datetime.fromtimestamp(row.arrived_at_s, UTC)),
            row.slo_class,
            row.tenant or "",
        )
        for row in rows
    ]
    _add(connection, RequestHour, _summed(keys, _request_numbers(rows)))


def _request_numbers(rows: Sequence[Row[Any]]) -> FloatArray:
    """What is summed of each request: (n, 14) in the order of `RequestHour`."""
    columns = ("output_tokens", "ttft_s", "tpot_s", "ttft_target_s", "tpot_target_s")
    output_tokens, ttft_s, tpot_s, ttft_target_s, tpot_target_s = (
        np.array([getattr(row, name) for row in rows], np.float64) for name in columns
    )
    finished = np.array([REQUEST_STATUSES[row.status] == "finished" for row in rows], np.bool_)
    ttft_met = slo.ttft_met(ttft_s, ttft_target_s) & finished
    tpot_met = slo.tpot_met(tpot_s, tpot_target_s, output_tokens, finished)
    ttft_target, tpot_target = ~np.isnan(ttft_target_s), ~np.isnan(tpot_target_s)
    return np.column_stack(
        (
            np.ones(len(rows)),
            finished,
            ttft_met & ttft_target,
            ~ttft_met & ttft_target,
            tpot_met & tpot_target,
            ~tpot_met & tpot_target,
            [row.input_tokens for row in rows],
            np.nan_to_num(output_tokens),
            *_moments(ttft_s),
            *_moments(tpot_s),
        )
    ).astype(np.float64)


def _moments(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of each value: whether it is there, itself, its square."""
    there = np.nan_to_num(values)
    return (~np.isnan(values)).astype(np.float64), there, there**2


def _hour(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)


def _summed(keys: Sequence[Key], numbers: FloatArray) -> dict[Key, FloatArray]:
    """The sum of the numbers (n, m) of each key."""
    places: dict[Key, int] = {}
    index = np.array([places.setdefault(key, len(places)) for key in keys], np.int64)
    sums = np.zeros((len(places), numbers.shape[1]))
    np.add.at(sums, index, numbers)
    return dict(zip(places, sums, strict=True))


def _add(connection: Connection, table: type[StepHour] | type[RequestHour], sums: dict[Any, FloatArray]) -> None:
    """Add sums to those that are there; in one order, so that two replicas do not wait for each other."""
    if not sums:
        return
    columns = table.__table__.columns
    names = [column.key for column in columns]
    key = [column.key for column in columns if column.primary_key]
    added = insert_into(connection, table)
    together = {name: columns[name] + added.excluded[name] for name in names if name not in key}
    values = [dict(zip(names, (*place, *sums[place].tolist()), strict=True)) for place in sorted(sums)]
    connection.execute(added.on_conflict_do_update(index_elements=key, set_=together), values)


def forget_in_hours(connection: Connection, tenants: Sequence[str] | None) -> None:
    """Let the sums of these tenants, or of all, be of nobody."""
    named = RequestHour.tenant != "" if tenants is None else RequestHour.tenant.in_(tenants)
    sums: dict[tuple[datetime, str, str], FloatArray] = {}
    for hour_at, slo_class, _, *numbers in connection.execute(select(RequestHour.__table__).where(named)):
        key = (hour_at, slo_class, "")
        sums[key] = sums.get(key, 0.0) + np.array(numbers, np.float64)
    connection.execute(delete(RequestHour).where(named))
    _add(connection, RequestHour, sums)
