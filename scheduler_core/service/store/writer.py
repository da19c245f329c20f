"""One thread that writes, behind a queue of a bounded number of rows.

While the database is away a batch fails at once, unless it is to be kept: then it stays in the queue, is tried again
every `RETRY_S`, and is lost only with the process.
"""

import logging
import math
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection

from kairos.scheduler_core.errors import BusyError, KairosError, StoreError
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

RETRY_S = 1.0
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


class _Waiting(NamedTuple):
    batch: Write[Any]
    future: Future[Any]
    keep: bool


class Writer:
    """Writes one batch after the other. It is acknowledged (its future has a result) once it is committed."""

    def __init__(self, store: Store, most_rows: int) -> None:
        self._store = store
        self._most_rows = most_rows
        self._lock = Lock()
        self._waiting_rows = 0
        self._rows_per_s = _RATE_AT_FIRST
        self._kept: deque[_Waiting] = deque()
        """What the database did not take; touched by the thread alone."""
        self._retry_at_s = 0.0
        """Monotonic; 0: the database answered the last time."""
        self._running: tuple[Thread, SimpleQueue[_Waiting | None]] | None = None

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue, those being written and those kept included."""
        return self._waiting_rows

    def put(self, batch: Write[T], *, keep: bool = False) -> Future[T]:
        """Have a batch written. A batch larger than the whole queue is taken when the queue is empty.

        Args:
            batch: the rows.
            keep: hold it while the database is away. Its future then fails only where the batch itself is at fault, or
                where the database is still away when the writer is drained.

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
                queue: SimpleQueue[_Waiting | None] = SimpleQueue()
                thread = Thread(target=self._run, args=[queue], name="kairos-store-writer", daemon=True)
                self._running = thread, queue
                thread.start()
            self._running[1].put(_Waiting(batch, future, keep))
        return future

    def drain(self) -> None:
        """Return once everything that waits is written; the thread has ended then, and a later batch starts another.

        What is kept is tried a last time.
        """
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            thread, queue = running
            queue.put(None)
            thread.join()

    def _run(self, queue: SimpleQueue[_Waiting | None]) -> None:
        while True:
            with suppress(Empty):
                wait_s = max(0.0, self._retry_at_s - time.monotonic()) if self._kept else None
                item = queue.get(timeout=wait_s)
                if item is None:
                    break
                self._take(item)
            if self._kept and time.monotonic() >= self._retry_at_s:
                self._try_kept()
        self._try_kept()
        lost = sum(_weight(item.batch) for item in self._kept)
        if lost:
            _log.error("%d rows that waited for the database are lost: it did not answer until the end", lost)
        while self._kept:
            item = self._kept.popleft()
            item.future.set_exception(StoreError("the database did not answer until the end; nothing was written"))
            self._done(item)

    def _take(self, item: _Waiting) -> None:
        if not item.future.set_running_or_notify_cancel():
            self._done(item)
        elif item.keep and self._kept:  # it is away
            self._kept.append(item)
        else:
            self._try(item)

    def _try_kept(self) -> None:
        """Write what was kept, as far as the database takes it; one that fails goes behind the others."""
        for _ in range(len(self._kept)):
            if not self._try(self._kept.popleft()):
                return

    def _try(self, item: _Waiting) -> bool:
        """Write a batch; False where the database does not take it, and then it is kept if it is to be."""
        began_s = time.monotonic()
        try:
            with self._store.write() as connection:
                written = item.batch.write(connection)
        except Exception as error:
            if item.keep and isinstance(error, StoreError):
                if not self._retry_at_s:
                    _log.warning("the database does not answer; what is to be kept waits: %s", error)
                self._kept.append(item)
                self._retry_at_s = time.monotonic() + RETRY_S
                return False
            if not isinstance(error, KairosError):
                _log.exception("a batch was not stored")
            item.future.set_exception(error)
            self._done(item)
            return not isinstance(error, StoreError)
        self._retry_at_s = 0.0  # it answers: what is kept may come
        item.future.set_result(written)
        self._rows_per_s = max(1.0, _weight(item.batch) / max(1e-6, time.monotonic() - began_s))
        self._done(item)
        return True

    def _done(self, item: _Waiting) -> None:
        with self._lock:
            self._waiting_rows -= _weight(item.batch)


def _weight(batch: Write[Any]) -> int:
    return max(1, batch.row_count)
