"""Emulated workers as a process, made like a group of a fleet or like all of them."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import uvloop

from kairos.adapters.control_plane import ControlPlane
from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.emulator.worker import EmulatedWorker, WorkerOptions
from kairos.scheduler_core.config import (
    ComputesPrompts,
    DecodeGroup,
    Group,
    HandsOver,
    InstanceRole,
    MixedGroup,
    PrefillGroup,
    Settings,
)
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Profile, StepTimes
from kairos.scheduler_core.errors import ConfigError

_REPORT_S = 2.0


def worker_options(
    settings: Settings,
    step_times_of: Callable[[Settings, str], StepTimes],
    role: InstanceRole,
    index: int,
    *,
    engine: str | None = None,
    bootstrap_port: int | None = None,
    prefix_cache: bool = False,
    **others: Any,
) -> WorkerOptions:
    """A worker as the `index`-th group of a role describes it; `others` are fields of the options.

    Raises:
        ConfigError: there is no such group.
        InputError: its step times cannot be loaded.
    """
    group = group_of(settings, role, index)
    if bootstrap_port is None:
        bootstrap_port = group.bootstrap_port if isinstance(group, PrefillGroup) else 0
    cached = isinstance(group, ComputesPrompts) and group.prefix_cache
    return WorkerOptions(
        engine=engine or group.engine or "vllm",  # type: ignore[arg-type]  # the command line offers the two
        role=role,
        models=settings.served_models(group),
        step_times=step_times_of(settings, group.profile),
        limits=_limits(group),
        connector=group.connector if isinstance(group, HandsOver) else "nixl",
        kv_transfer=settings.fleet.kv_transfer,
        prefix_cache=prefix_cache or cached,
        kv_events_port=group.kv_events_port if isinstance(group, ComputesPrompts) else None,
        kv_replay_port=group.kv_replay_port if isinstance(group, ComputesPrompts) else None,
        bootstrap_port=bootstrap_port,
        **others,
    )


def fleet_options(
    settings: Settings,
    step_times_of: Callable[[Settings, str], StepTimes],
    planes: Mapping[str, ControlPlane],
    **others: Any,
) -> list[WorkerOptions]:
    """A worker for every address of the fleet; `planes` are told the steps of their profiles.

    Raises:
        ConfigError: no group has an address.
        InputError: step times cannot be loaded.
    """
    found = []
    for role, index, group in settings.fleet.groups():
        parts = urlsplit(group.url or "")
        if parts.hostname is None or parts.port is None:
            continue
        plane = planes.get(group.profile)
        place: dict[str, Any] = {"host": parts.hostname, "port": parts.port, "on_step": plane and plane.note}
        found.append(worker_options(settings, step_times_of, role, index, **place, **others))
    if not found:
        raise ConfigError("no group of the fleet has a url with a port; --whole-fleet takes its workers from there")
    return found


def group_of(settings: Settings, role: InstanceRole, index: int) -> Group:
    """The `index`-th group of a role.

    Raises:
        ConfigError: there is no such group.
    """
    groups: tuple[Group, ...] = getattr(settings.fleet, role)
    if index >= len(groups):
        raise ConfigError(f"fleet.{role} has {len(groups)} groups; there is no number {index}")
    return groups[index]


def reporting_to(url: str, profile: Profile, key: str) -> ControlPlane:
    """The control plane that steps of a profile are sent to.

    Raises:
        ConfigError: it is no address.
    """
    return ControlPlane(url, profile, f"emulated-{os.urandom(4).hex()}", key)


def _limits(group: Group) -> Limits:
    computes = group if isinstance(group, ComputesPrompts) else None
    decodes = group if isinstance(group, DecodeGroup | MixedGroup) else None
    kv_tokens = decodes.kv_tokens if decodes else computes.kv_tokens if computes else None
    return Limits(
        chunk_tokens=computes.chunk_tokens if computes else None,
        max_requests_per_step=computes.max_requests_per_step if computes else 1,
        max_batch=decodes.max_batch if decodes else 64,
        kv_tokens=kv_tokens or UNLIMITED_TOKENS,
    )


def run_workers(workers: Sequence[WorkerOptions], planes: Collection[ControlPlane] = ()) -> None:
    """Run until SIGTERM or SIGINT. Says on stdout where each listens; what `planes` were told is sent.

    Raises:
        ConfigError: a port cannot be had.
    """
    uvloop.run(_run(workers, planes))


async def _run(wanted: Sequence[WorkerOptions], planes: Collection[ControlPlane]) -> None:
    workers = [EmulatedWorker(options) for options in wanted]
    ends = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ends.set)
    for worker in workers:
        options = worker.options
        try:
            await worker.start()
        except OSError as problem:
            where = f"{options.host}:{options.port}"
            raise ConfigError(f"cannot listen on {where}: {problem.strerror or problem}") from None
        print(f"{options.engine} {options.role} worker on {worker.address}", flush=True)
    gc.freeze()
    await asyncio.gather(ends.wait(), *(_report(plane, ends) for plane in planes))
    await asyncio.gather(*(worker.stop(grace_s=1.0) for worker in workers))


async def _report(plane: ControlPlane, ends: asyncio.Event) -> None:
    """Send steps until the end, and what is left then; a worker takes no strategy and no model."""
    while not ends.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_S):
                await ends.wait()
        await asyncio.to_thread(plane.exchange)
        plane.news.clear()
