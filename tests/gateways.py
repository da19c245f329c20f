"""A gateway in front of emulated workers: all in this event loop, or as processes."""

import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import httpx
from emulated import MODEL, options, workers

from kairos.adapters.emulator.worker import EmulatedWorker, WorkerOptions
from kairos.adapters.gateway.gateway import Gateway
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config import Settings

LINEAR = {"prefill": {"b_s": 1e-6}, "decode": {"a_s": 1e-3}}


def fleet_of(running: Sequence[EmulatedWorker], **group: Any) -> dict[str, Any]:
    """The fleet section for running workers; `group` holds settings of every group."""
    fleet: dict[str, Any] = {"prefill": [], "decode": [], "mixed": []}
    for worker in running:
        told: dict[str, Any] = {"profile": "p", "url": worker.address}
        if worker.options.role != "mixed":
            told["connector"] = worker.options.connector
        if worker.bootstrap is not None:
            told["bootstrap_port"] = worker.bootstrap.port
        if worker.options.role == "decode":
            told |= {name: value for name, value in group.items() if name not in PREFILL_ONLY}
        else:
            told |= group
        fleet[worker.options.role].append(told)
    return fleet


PREFILL_ONLY = ("in_flight", "prefix_cache")


def settings_for(fleet: dict[str, Any], gateway: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """Settings with one profile, that of the emulated workers, and a quick eye on their health."""
    document: dict[str, Any] = {
        "profiles": {"p": {"gpu": "H100", "model": MODEL, "step_times": {"linear": LINEAR}}},
        "fleet": fleet,
        "gateway": {"port": 0, "health_s": 0.05} | (gateway or {}),
    }
    return Settings.model_validate(document | changes)


@asynccontextmanager
async def running_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """A gateway that has looked at its engines."""
    gateway = Gateway(settings, step_times_of)
    await gateway.start()
    try:
        for instance in gateway.scheduler.instances.values():
            await gateway.health.look(instance)
        yield gateway
    finally:
        await gateway.stop()


@asynccontextmanager
async def behind_gateway(
    *wanted: WorkerOptions, gateway: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[tuple[Gateway, list[EmulatedWorker]]]:
    """Workers and a gateway in front of them."""
    async with workers(*wanted) as running:
        settings = settings_for(fleet_of(running, **(group or {})), gateway, **changes)
        async with running_gateway(settings) as serving:
            yield serving, running


def pair(**changes: Any) -> tuple[WorkerOptions, WorkerOptions]:
    """A prefill and a decode worker."""
    return options(role="prefill", **changes), options(role="decode", **changes)


KINDS = {
    "plain vllm": (options(),),
    "plain sglang": (options(engine="sglang"),),
    "nixl": pair(),
    "mooncake": pair(connector="mooncake"),
    "sglang": pair(engine="sglang"),
}
"""Every kind of engine that the gateway speaks with."""

QUICK = {"timeouts": {"first_token_s": 0.3, "idle_s": 0.3, "total_s": 1.0, "connect_s": 0.5, "drain_s": 0.5}}
"""Settings of a gateway that does not wait long."""


def left_behind(gateway: Gateway) -> dict[str, int]:
    """What a gateway that has nothing to do still counts."""
    scheduler = gateway.scheduler
    sides = [i.decode for i in scheduler.instances.values() if i.decode]
    return {
        "calls": len(gateway.app.calls) + gateway.app.others,
        "waiting": len(scheduler.waiting) + sum(pool.waiting_requests() for pool in scheduler.pools),
        "prompts": sum(len(i.prefill.flights) for i in scheduler.instances.values() if i.prefill),
        "decodes": sum(side.requests + side.sum_context_tokens for side in sides),
        "busy connections": sum(i.http.busy for i in scheduler.instances.values()),
    }


NOTHING = dict.fromkeys(("calls", "waiting", "prompts", "decodes", "busy connections"), 0)


# -- as processes

PROGRAM = [sys.executable, "-c", "from kairos.adapters.cli import main; main()"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


@contextmanager
def process(*arguments: object) -> Iterator["subprocess.Popen[str]"]:
    running = subprocess.Popen([*PROGRAM, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.terminate()
        running.communicate(timeout=20)


def wait_for(address: str, limit_s: int = 60) -> None:
    for _ in range(10 * limit_s):
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")
