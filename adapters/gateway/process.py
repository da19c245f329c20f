"""The gateway as a process: signals, and the loop it runs on."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable

import uvloop

from kairos.adapters.gateway.fleet import StepTimesOf
from kairos.adapters.gateway.gateway import Gateway
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import ConfigError, KairosError

_log = logging.getLogger(__name__)

_GARBAGE_OBJECTS = 20_000
"""A request leaves no cycles behind, so cycles are looked for seldom."""


def run_gateway(load: Callable[[], Settings], step_times_of: StepTimesOf) -> None:
    """Run until SIGTERM or SIGINT; SIGHUP loads the settings again.

    Raises:
        KairosError: the settings cannot be used, or the port cannot be had.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    settings = load()
    uvloop.run(_run(load, settings, step_times_of))


async def _run(load: Callable[[], Settings], settings: Settings, step_times_of: StepTimesOf) -> None:
    gateway = Gateway(settings, step_times_of)
    loop = asyncio.get_running_loop()
    ends, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ends.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    try:
        await gateway.start()
    except OSError as problem:
        wanted = settings.gateway
        raise ConfigError(f"cannot listen on {wanted.host}:{wanted.port}: {problem.strerror or problem}") from None
    _log.info("gateway on %s", gateway.server.address)
    gc.freeze()
    gc.set_threshold(_GARBAGE_OBJECTS)
    reloads = loop.create_task(_reload(gateway, load, again))
    await ends.wait()
    reloads.cancel()
    await gateway.stop()


async def _reload(gateway: Gateway, load: Callable[[], Settings], again: asyncio.Event) -> None:
    """Read the settings again whenever asked to; those that cannot be used change nothing."""
    while True:
        await again.wait()
        again.clear()
        try:
            await gateway.reload(await asyncio.to_thread(load))
        except KairosError as problem:
            gateway.metrics.reloads["refused"] += 1
            _log.error("the configuration was read again and cannot be used, nothing has changed: %s", problem)
        else:
            gateway.metrics.reloads["done"] += 1
            _log.info("the configuration was read again")
