"""Emulated workers for tests, in this event loop: 1,000 prompt tokens and a decode step take a millisecond each."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvloop
from builders import step_times

from kairos.adapters.emulator.worker import EmulatedWorker, WorkerOptions
from kairos.adapters.http_client import HttpPool

MODEL = "tiny"
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], limit_s: float = 30.0) -> T:
    """The result of a coroutine that must end in time."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(limited())


def options(**changes: Any) -> WorkerOptions:
    """A worker of vLLM that serves `tiny`."""
    times = step_times(prefill=(0.0, 1e-6, 0.0), decode=(1e-3, 0.0, 0.0))
    told: dict[str, Any] = {"engine": "vllm", "role": "mixed", "models": (MODEL,), "step_times": times}
    return WorkerOptions(**told | changes)


@asynccontextmanager
async def workers(*wanted: WorkerOptions) -> AsyncIterator[list[EmulatedWorker]]:
    """Running workers."""
    started = [EmulatedWorker(each) for each in wanted]
    try:
        for worker in started:
            await worker.start()
        yield started
    finally:
        for worker in started:
            await worker.stop()


async def call(
    address: str, path: str, body: object = None, headers: tuple[tuple[bytes, bytes], ...] = (), method: bytes = b""
) -> tuple[int, bytes]:
    """Status and body of a request; a body is sent as JSON."""
    pool = HttpPool(address)
    try:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await pool.send(method or (b"GET" if body is None else b"POST"), path.encode(), headers, raw)
        return answer.status, await answer.body()
    finally:
        pool.close()


def events(body: bytes) -> list[Any]:
    """The events of a stream: JSON, or the text [DONE]."""
    found = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    return [event.decode() if event == b"[DONE]" else json.loads(event) for event in found]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that the running tasks bring about."""
    while not condition():
        await asyncio.sleep(0.002)
