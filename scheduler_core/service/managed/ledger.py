"""Keeps reservations in the database: many in one transaction, merged with what other replicas wrote of them.

Every change gets a number that rises in the order of commits, so that whoever has seen all up to one misses none. When
the database is away, what is to be stored waits, one state a reservation, and is written once it is back.
"""

import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Condition

import msgspec
from sqlalchemy import Connection

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.managed.book import REMEMBER_S
from kairos.scheduler_core.service.managed.reservation import Reservation, telemetry_of
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.queries.reservations import (
    ReservationRow,
    next_change,
    put_reservations,
    reservations_named,
)
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, add_batch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import RequestRow

_log = logging.getLogger(__name__)

AGAIN_AFTER_S = 1.0
"""How soon a database that was away is tried again."""
_MOST_AT_ONCE = 1_000


class Committed(msgspec.Struct):
    """What a transaction did."""

    reservations: list[Reservation]
    """As they are in the database."""
    ended: list[Reservation]
    """Those of them that ended with it."""
    rows: list[RequestRow]
    """Telemetry of those."""


class Ledger:
    """Writes from a thread of its own.

    Args:
        committed: called with what each transaction did.
    """

    def __init__(self, store: Store, committed: Callable[[Committed], None]) -> None:
        self._store, self._committed = store, committed
        self._dirty: dict[str, Reservation] = {}
        self._futures: dict[str, Future[Reservation | None]] = {}
        self._changed = Condition()
        self._stopped = False
        self._away = False
        self._background = Background("kairos-reservations", self._run)

    def put(self, reservation: Reservation) -> "Future[Reservation | None]":
        """Have a state stored; what is stored then, or None: not yet, the database is away."""
        request_id = reservation.terms.request_id
        with self._changed:
            self._dirty[request_id] = reservation
            future = self._futures.get(request_id)
            if future is None:
                future = Future()
                if self._away:
                    future.set_result(None)
                else:
                    self._futures[request_id] = future
            self._changed.notify()
        return future

    def start(self) -> None:
        """Begin to write."""
        self._stopped = False
        self._background.start()

    def stop(self) -> None:
        """Return once everything was tried."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._background.stop()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._away and not self._stopped:
                    self._changed.wait(AGAIN_AFTER_S)
                while not self._dirty and not self._stopped:
                    self._changed.wait()
                if self._stopped and (self._away or not self._dirty):
                    return
                ids = list(self._dirty)[:_MOST_AT_ONCE]
                batch = [self._dirty.pop(request_id) for request_id in ids]
                futures = [self._futures.pop(request_id, None) for request_id in ids]
            self._write(batch, futures)

    def _write(self, batch: list[Reservation], futures: "Sequence[Future[Reservation | None] | None]") -> None:
        try:
            with self._store.write() as connection:
                done = write_reservations(connection, batch)
        except StoreError as error:
            if not self._away:
                _log.warning("reservations are kept in memory until the database answers again: %s", error)
            self._away = True
            with self._changed:
                self._dirty = {r.terms.request_id: r for r in batch} | self._dirty
                futures = [*futures, *self._futures.values()]
                self._futures.clear()
            _resolve(futures, [None] * len(futures))
        except Exception as error:  # the thread's top: a bug; these are not stored, and whoever waits learns it
            _log.exception("reservations were not stored")
            for future in futures:
                if future is not None:
                    future.set_exception(error)
        else:
            self._away = False
            self._committed(done)
            _resolve(futures, done.reservations)


def _resolve(futures: "Sequence[Future[Reservation | None] | None]", results: Sequence[Reservation | None]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future is not None:
            future.set_result(result)


def write_reservations(connection: Connection, batch: Sequence[Reservation]) -> Committed:
    """Store states, each merged with what is there; the telemetry of those that end goes with them."""
    change = next_change(connection)  # and nobody else writes until this is committed
    there = {row.request_id: row for row in reservations_named(connection, [r.terms.request_id for r in batch])}
    done = Committed([], [], [])
    rows: list[ReservationRow] = []
    for reservation in batch:
        row = there.get(reservation.terms.request_id)
        before = None if row is None else reservation_of(row)
        if before is not None:
            same = before.terms.digest == reservation.terms.digest
            reservation = before.moved(reservation.progress) if same else before
        done.reservations.append(reservation)
        if reservation != before:
            rows.append(_row_of(reservation, change + len(rows)))
            if reservation.progress.holds and not (before and before.progress.holds):
                done.ended.append(reservation)
                if (told := telemetry_of(reservation)) is not None:
                    done.rows.append(told)
    if rows:
        put_reservations(connection, rows, set(there))
        announce(connection, "reservations")
    if done.rows:
        add_batch(connection, RequestBatch(f"managed/{uuid.uuid4().hex}", uuid.uuid4().bytes, done.rows))
    return done


def reservation_of(row: ReservationRow) -> Reservation:
    """What a row holds."""
    return msgspec.convert(row.body, Reservation)


def _row_of(reservation: Reservation, change: int) -> ReservationRow:
    terms, end = reservation.terms, reservation.progress.holds
    until_s = reservation.progress.expires_at_s if end is None else end.at_s + REMEMBER_S
    return ReservationRow(
        terms.request_id, terms.tenant or None, reservation.stage, until_s, change, msgspec.to_builtins(reservation)
    )
