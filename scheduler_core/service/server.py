"""The application under uvicorn: drained on SIGTERM, configured anew on SIGHUP, and no hostage of slow clients."""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from threading import Timer
from types import FrameType
from typing import Any

import uvicorn
from anyio import to_thread
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kairos.scheduler_core.config import ServiceSettings, Settings
from kairos.scheduler_core.service.access import require_loopback
from kairos.scheduler_core.service.lifecycle import Lifecycle

_log = logging.getLogger(__name__)


def run_server(app: FastAPI, settings: ServiceSettings, load: Callable[[], Settings]) -> None:
    """Serve until a signal ends it.

    Args:
        load: reads the configuration again.

    Raises:
        ConfigError: the address is open to other machines, and there are no keys.
    """
    lifecycle: Lifecycle = app.state.lifecycle
    if not lifecycle.keys_required:
        require_loopback(settings.host)
    Server(app, settings, lifecycle, load).run()


class Server(uvicorn.Server):
    """uvicorn's server with our signals.

    SIGTERM: /readyz says `draining` for `drain_notice_s`, during which requests are still taken; then no new ones are,
    those in flight end, parts stop and what waits is written. SIGINT leaves the notice out. After `drain_s` the process
    ends, whatever still hangs.
    """

    def __init__(
        self, app: FastAPI, settings: ServiceSettings, lifecycle: Lifecycle, load: Callable[[], Settings]
    ) -> None:
        self._settings, self._lifecycle, self._load = settings, lifecycle, load
        self._leaves_at_s = math.inf
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None
        in_flight_s = (settings.drain_s - settings.drain_notice_s) / 2  # the other half is for parts and the writer
        protocol = type("Protocol", (PatientProtocol,), {"head_s": settings.client_timeout_s})
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(in_flight_s),
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        """Start; from then on SIGHUP has the configuration read again."""
        await super().startup(sockets)
        signal.signal(signal.SIGHUP, self._ask_for_reload)
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        _log.info("the service listens", extra={"host": host, "port": port, "keys": self._lifecycle.keys_required})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; the second signal ends the notice, the third everything."""
        if self.should_exit:
            self.force_exit = True
        elif sig == signal.SIGINT or self._leaves_at_s < math.inf:
            self._leaves_at_s = 0.0
        else:
            self._leaves_at_s = time.monotonic() + self._settings.drain_notice_s
        self._lifecycle.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to leave."""
        if self._reload_asked and (self._reloading is None or self._reloading.done()):
            self._reload_asked = False
            self._reloading = asyncio.create_task(to_thread.run_sync(self._lifecycle.reload, self._load))
        if time.monotonic() >= self._leaves_at_s:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """End within what is left of the drain."""
        left_s = self._settings.drain_s - self._settings.drain_notice_s
        _log.info("the service ends", extra={"within_s": left_s})
        watchdog = Timer(left_s, _give_up, [left_s])
        watchdog.daemon = True
        watchdog.start()
        await super().shutdown(sockets)

    def _ask_for_reload(self, sig: int, frame: FrameType | None) -> None:
        self._reload_asked = True


def _give_up(after_s: float) -> None:
    _log.error("the service did not end in time; what was acknowledged is stored", extra={"after_s": after_s})
    os._exit(1)


class PatientProtocol(HttpToolsProtocol):
    """Closes connections on which the head of a request does not come in time; bodies have a limit of their own."""

    head_s = math.inf
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._due = self.loop.call_later(self.head_s, transport.close)

    def on_message_begin(self) -> None:
        """Wait for the head of another request."""
        super().on_message_begin()
        if self._due is None:
            self._due = self.loop.call_later(self.head_s, self.transport.close)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._cancel()
        super().connection_lost(exc)

    def _cancel(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
