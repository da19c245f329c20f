"""What other replicas wrote, soon after they did: PostgreSQL's LISTEN and NOTIFY, and a look every second besides.

A watcher is a function that looks up what it needs and takes it over; it is called at the start, when somebody
announces its topic, and every `POLL_S` whatever happened, so that a lost announcement costs a second. SQLite has one
service: it looks every `POLL_S`, and at once where that service wrote itself (`look`).
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import psycopg
from sqlalchemy import Connection, text

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

POLL_S = 1.0
_CHANNEL = "kairos"

Topic = Literal["models", "strategies", "experiments", "reservations", "instances", "keys"]


def announce(connection: Connection, topic: Topic) -> None:
    """Tell the other replicas, once this transaction is committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_notify(:channel, :topic)"), {"channel": _CHANNEL, "topic": topic})


class Changes:
    """Calls watchers from a thread of its own, one after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: dict[Topic, list[Callable[[], None]]] = {}
        self._background = Background("kairos-changes", self._run)
        self.failed_looks = 0
        """Since the start; each is tried again within `POLL_S`."""
        self.away = False
        """Whether the database did not answer when it was last asked."""

    def watch(self, topic: Topic, look: Callable[[], None]) -> None:
        """Have a function called. It raises StoreError while the database is away; nothing else."""
        self._watchers.setdefault(topic, []).append(look)

    def look(self, topic: Topic) -> None:
        """Call the watchers of a topic now, in this thread.

        Raises:
            StoreError: the database is away.
        """
        for watcher in self._watchers.get(topic, ()):
            watcher()

    def start(self) -> None:
        """Begin, with a look at everything."""
        self._look_all()
        self._background.start()

    def stop(self) -> None:
        """Return once no watcher runs any more."""
        self._background.stop()

    def _run(self) -> None:
        while not self._background.stopped.is_set():
            if self._store.embedded:
                self._background.stopped.wait(POLL_S)
                self._look_all()
                continue
            try:
                with self._store.listening(_CHANNEL) as connection:
                    self.away = False
                    self._listen(connection)
            except (StoreError, psycopg.Error) as error:
                self._note(error)
                self._background.stopped.wait(POLL_S)

    def _listen(self, connection: "psycopg.Connection[Any]") -> None:
        due_s = time.monotonic()
        while not self._background.stopped.is_set():
            wait_s = due_s - time.monotonic()
            if wait_s <= 0:
                self._look_all()
                due_s = time.monotonic() + POLL_S
                continue
            told = {notice.payload for notice in connection.notifies(timeout=wait_s, stop_after=1)}
            for topic in self._watchers:
                if topic in told:
                    self._try(topic)

    def _look_all(self) -> None:
        for topic in self._watchers:
            self._try(topic)

    def _try(self, topic: Topic) -> None:
        try:
            self.look(topic)
        except StoreError as error:
            self._note(error)
        else:
            self.away = False

    def _note(self, error: Exception) -> None:
        self.failed_looks += 1
        if not self.away:
            _log.warning("changes in the database are not seen until it answers again: %s", error)
        self.away = True
