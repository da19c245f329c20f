"""Has one replica train for all: takes the lease when there is work, and keeps a training process running meanwhile."""

import logging
import os
import subprocess
import sys
import time
import uuid

import msgspec

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.models.lifecycle import LEASE, LEASE_S
from kairos.scheduler_core.service.models.worker import Order
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.queries.leases import give_back_lease, take_lease
from kairos.scheduler_core.service.store.session import Store

_log = logging.getLogger(__name__)

POLL_S = 1.0
AFTER_A_CRASH_S = 5.0
"""Until another process is started in place of one that ended with an error."""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Trainer:
    """Looks for work from a thread of its own."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._holder = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._background = Background("kairos-trainer", self._run)
        self._renew_s = self._start_s = 0.0
        """When the lease is due again, and before when no process is started; of the monotonic clock."""

    def start(self) -> None:
        """Begin."""
        self._background.start()

    def stop(self) -> None:
        """End the training process, whatever it does: it leaves nothing half-made, and the next one goes on."""
        self._background.stop()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            try:
                self._give_back()
            except StoreError as error:
                _log.warning("the lease of the trainer runs out by itself: %s", error)

    def _run(self) -> None:
        while not self._background.stopped.wait(POLL_S):
            try:
                self._look()
            except StoreError:  # the database is away, which /readyz says; the process ends by itself
                continue

    def _look(self) -> None:
        now_s = time.monotonic()
        if self._process is None:
            if now_s >= self._start_s:
                self._begin(now_s)
        elif (code := self._process.poll()) is not None:
            self._process = None
            if code:
                self._start_s = now_s + AFTER_A_CRASH_S
                _log.error("the training process ended with %s; what it was at is taken up again", code)
                with self._store.write() as connection:
                    add_event(connection, "trainer_ended", self._holder, {"code": code})
            self._give_back()
        elif now_s >= self._renew_s:
            self._renew_s = now_s + LEASE_S / 3
            with self._store.write() as connection:
                take_lease(connection, LEASE, self._holder, LEASE_S)

    def _begin(self, now_s: float) -> None:
        with self._store.read() as connection:
            if not queries.work_waits(connection):
                return
        with self._store.write() as connection:
            if not take_lease(connection, LEASE, self._holder, LEASE_S):
                return
            queries.take_up_trainings(connection)
        self._renew_s = now_s + LEASE_S / 3
        self._process = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        url = self._store.engine.url.render_as_string(hide_password=False)
        settings = self._settings.model_dump(mode="json", exclude={"store", "access"})  # no secret but the address
        order = Order(url, settings, self._holder, os.getpid())
        process = subprocess.Popen(
            [sys.executable, "-m", "kairos.scheduler_core.service.models.worker"],
            stdin=subprocess.PIPE,
            env=os.environ | dict.fromkeys(_ONE_THREAD, "1"),
        )
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(msgspec.json.encode(order))
        return process

    def _give_back(self) -> None:
        with self._store.write() as connection:
            give_back_lease(connection, LEASE, self._holder)
