"""One thread that stores telemetry, behind a queue of a bounded number of rows."""

import logging
import math
import time
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread

from kairos.scheduler_core.errors import BusyError, KairosError
from kairos.scheduler_core.service.store.queries import RequestBatch, StepBatch, Stored, add_batch
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

_RATE_AT_FIRST = 50_000.0
"""Rows a second that are assumed until one batch was timed."""


_Waiting = tuple[StepBatch | RequestBatch, Future[Stored]]


class Writer:
    """Stores batches one after the other. A batch is acknowledged (its future has a result) once it is committed."""

    def __init__(self, store: Store, most_rows: int) -> None:
        self._store = store
        self._most_rows = most_rows
        self._lock = Lock()
        self._waiting_rows = 0
        self._rows_per_s = _RATE_AT_FIRST
        self._running: tuple[Thread, SimpleQueue[_Waiting | None]] | None = None

    def put(self, batch: StepBatch | RequestBatch) -> Future[Stored]:
        """Have a batch stored. A batch larger than the whole queue is taken when the queue is empty.

        Raises:
            BusyError: the queue is full.
        """
        rows = _weight(batch)
        future: Future[Stored] = Future()
        with self._lock:
            if self._waiting_rows and self._waiting_rows + rows > self._most_rows:
                raise BusyError(
                    f"{self._waiting_rows} rows of telemetry wait to be stored, and {rows} more are over the limit of "
                    f"{self._most_rows} (store.queued_rows)",
                    math.ceil(self._waiting_rows / self._rows_per_s),
                )
            self._waiting_rows += rows
            if self._running is None:
                queue: SimpleQueue[_Waiting | None] = SimpleQueue()
                thread = Thread(target=self._run, args=[queue], name="kairos-store-writer", daemon=True)
                self._running = thread, queue
                thread.start()
            self._running[1].put((batch, future))
        return future

    def drain(self) -> None:
        """Return once everything that waits is stored; the thread has ended then, and a later batch starts another."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            thread, queue = running
            queue.put(None)
            thread.join()

    def _run(self, queue: SimpleQueue[_Waiting | None]) -> None:
        while (item := queue.get()) is not None:
            batch, future = item
            if future.set_running_or_notify_cancel():
                began_s = time.monotonic()
                try:
                    with self._store.write() as connection:
                        stored = add_batch(connection, batch)
                except Exception as error:
                    if not isinstance(error, KairosError):
                        _log.exception("a batch of telemetry was not stored")
                    future.set_exception(error)
                else:
                    future.set_result(stored)
                    if not stored.duplicate:
                        self._rows_per_s = max(1.0, _weight(batch) / max(1e-6, time.monotonic() - began_s))
            with self._lock:
                self._waiting_rows -= _weight(batch)


def _weight(batch: StepBatch | RequestBatch) -> int:
    return max(1, len(batch.rows))
