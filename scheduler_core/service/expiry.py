"""What is older than it is to be kept goes in the background, at one replica, with room for others between pages."""

import logging
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from starlette.routing import BaseRoute

from kairos.scheduler_core.config import Retention
from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.store.queries.leases import give_back_lease, take_lease
from kairos.scheduler_core.service.store.queries.retention import expiring
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

EVERY_S = 3600.0
_LEASE, _LEASE_S = "expiry", 120.0
"""Longer than a page takes."""


class Expiry:
    """Runs at the start and every hour."""

    def __init__(self, store: Store, kept: Retention, metrics: Metrics) -> None:
        self._store = store
        self._kept = kept
        self._metrics = metrics
        self._holder = uuid.uuid4().hex
        self._background = Background("kairos-expiry", self._run)

    def routes(self) -> Sequence[BaseRoute]:
        """None: it works in the background."""
        return ()

    def start(self) -> None:
        """Begin; after `stop`, anew."""
        self._background.start()

    def stop(self) -> None:
        """Return once the page in work is done."""
        self._background.stop()

    def _run(self) -> None:
        while True:
            try:
                self.expire()
            except StoreError as error:
                self._metrics.expiry_failures.inc()
                _log.warning("old rows stay until the next hour: %s", error)
            except Exception:
                self._metrics.expiry_failures.inc()
                _log.exception("old rows stay until the next hour")
            if self._background.stopped.wait(EVERY_S):
                return

    def expire(self) -> None:
        """Delete what is old, unless another replica does.

        Raises:
            StoreError: the database is away.
        """
        if not self._leads():
            return
        began_s = time.monotonic()
        for table, rows in expiring(self._store, self._kept, datetime.now(UTC)):
            self._metrics.expired_rows.labels(table).inc(rows)
            self._background.stopped.wait(time.monotonic() - began_s)  # half the time is others'
            if self._background.stopped.is_set() or not self._leads():
                break
            began_s = time.monotonic()
        with self._store.write() as connection:
            give_back_lease(connection, _LEASE, self._holder)

    def _leads(self) -> bool:
        with self._store.write() as connection:
            return take_lease(connection, _LEASE, self._holder, _LEASE_S)
