"""One thread that writes, behind a queue of a bounded number of rows."""

import logging
import math
import time
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from kairos.scheduler_core.errors import BusyError, KairosError
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

_RATE_AT_FIRST = 50_000.0
"""Rows a second that are assumed until one batch was timed."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Write(Protocol[T_co]):
    """Rows that are written together or not at all."""

    @property
    def row_count(self) -> int:
        """How many."""

    def write(self, connection: Connection) -> T_co:
        """Write them, in the transaction of the connection; what became of them."""


class Writer:
    """Writes one batch after the other. It is acknowledged (its future has a result) once it is committed."""

    def __init__(self, store: Store, most_rows: int) -> None:
        self._store = store
        self._most_rows = most_rows
        self._lock = Lock()
        self._waiting_rows = 0
        self._rows_per_s = _RATE_AT_FIRST
        self._running: tuple[Thread, SimpleQueue[tuple[Write[Any], Future[Any]] | None]] | None = None

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue, those being written included."""
        return self._waiting_rows

    def put(self, batch: Write[T]) -> Future[T]:
        """Have a batch written. A batch larger than the whole queue is taken when the queue is empty.

        Raises:
            BusyError: the queue is full.
        """
        rows = _weight(batch)
        future: Future[T] = Future()
        with self._lock:
            if self._waiting_rows and self._waiting_rows + rows > self._most_rows:
                raise BusyError(
                    f"{self._waiting_rows} rows of telemetry wait to be stored, and {rows} more are over the limit of "
                    f"{self._most_rows} (store.queued_rows)",
                    math.ceil(self._waiting_rows / self._rows_per_s),
                )
            self._waiting_rows += rows
            if self._running is None:
                queue: SimpleQueue[tuple[Write[Any], Future[Any]] | None] = SimpleQueue()
                thread = Thread(target=self._run, args=[queue], name="kairos-store-writer", daemon=True)
                self._running = thread, queue
                thread.start()
            self._running[1].put((batch, future))
        return future

    def drain(self) -> None:
        """Return once everything that waits is written; the thread has ended then, and a later batch starts another."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            thread, queue = running
            queue.put(None)
            thread.join()

    def _run(self, queue: SimpleQueue[tuple[Write[Any], Future[Any]] | None]) -> None:
        while (item := queue.get()) is not None:
            batch, future = item
            if future.set_running_or_notify_cancel():
                began_s = time.monotonic()
                try:
                    with self._store.write() as connection:
                        written = batch.write(connection)
                except Exception as error:
                    if not isinstance(error, KairosError):
                        _log.exception("a batch was not stored")
                    future.set_exception(error)
                else:
                    future.set_result(written)
                    self._rows_per_s = max(1.0, _weight(batch) / max(1e-6, time.monotonic() - began_s))
            with self._lock:
                self._waiting_rows -= _weight(batch)


def _weight(batch: Write[Any]) -> int:
    return max(1, batch.row_count)
