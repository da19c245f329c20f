"""Thousands of requests, every kind of fault at once: each has one outcome, and nothing stays behind.

KAIROS_FAULT_REQUESTS says how many requests there are for each kind of engines; the suite sends 300.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from emulated import MODEL, run, until
from gateways import KINDS, NOTHING, QUICK, behind_gateway, left_behind

from kairos.adapters.emulator.faults import Fault
from kairos.adapters.emulator.worker import EmulatedWorker
from kairos.adapters.gateway.gateway import Gateway
from kairos.adapters.http_client import HttpPool, UpstreamError

REQUESTS = int(os.environ.get("KAIROS_FAULT_REQUESTS", "300"))
SHARE = 0.05
AT_A_TIME = 48
LARGEST_BYTES = 20_000
GATEWAY = QUICK | {"max_body_bytes": LARGEST_BYTES}


def asked(stream: bool, **changes: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "x" * 40, "max_tokens": 4, "stream": stream} | changes).encode()


class Clients:
    """Clients that behave, and those that do not; what each was told."""

    def __init__(self, address: str, rng: random.Random) -> None:
        self.told = Counter[str]()
        self._pool = HttpPool(address)
        self._host, self._port = urlsplit(address).hostname, urlsplit(address).port
        self._rng = rng
        self._faulty: list[Callable[[bool], Awaitable[str]]] = [
            *(self._leaves, self._reads_nothing, self._sends_half, self._sends_no_json, self._sends_too_much),
            *(self._names_another_model,),
        ]

    async def send(self) -> None:
        """One request: each fault of a client has its share."""
        drawn, stream = self._rng.random(), self._rng.random() < 0.5
        place = int(drawn / SHARE)
        one = self._faulty[place] if place < len(self._faulty) else self._behaves
        try:
            self.told[await one(stream)] += 1
        except UpstreamError as problem:  # `connect`: a machine too busy to let it in
            self.told[f"no answer: {problem.kind}"] += 1
        except ConnectionResetError:
            self.told["cut"] += 1

    def close(self) -> None:
        self._pool.close()

    async def _ask(self, raw: bytes) -> str:
        answer = await self._pool.send(b"POST", b"/v1/completions", (), raw)
        body = await answer.body()
        return "answered" if b'"error"' not in body else f"told {answer.status}"

    async def _behaves(self, stream: bool) -> str:
        return await self._ask(asked(stream))

    async def _leaves(self, stream: bool) -> str:
        answer = await self._pool.send(b"POST", b"/v1/completions", (), asked(True, max_tokens=50))
        answer.close()
        return "left"

    async def _reads_nothing(self, stream: bool) -> str:
        """It reads one byte of its answer."""
        return await self._raw(asked(True, prompt="x" * 4_000, max_tokens=50), reads=False)

    async def _sends_half(self, stream: bool) -> str:
        return await self._raw(asked(stream), sends=20)

    async def _sends_no_json(self, stream: bool) -> str:
        return await self._ask(b'{"model": ')

    async def _sends_too_much(self, stream: bool) -> str:
        return await self._ask(asked(stream, prompt="x" * 2 * LARGEST_BYTES))

    async def _names_another_model(self, stream: bool) -> str:
        return await self._ask(asked(stream, model="another"))

    async def _raw(self, body: bytes, sends: int | None = None, reads: bool = True) -> str:
        """A request of a client that sends a part of its body, or does not read for a while; then it leaves."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[:sends])
        if reads:
            status = (await reader.readline()).split()
            told = f"told {status[1].decode()}" if status else "cut"
        else:
            told = "left" if await reader.read(1) else "cut"
        writer.transport.abort()
        return told


async def lose_engines(gateway: Gateway, running: list[EmulatedWorker], rng: random.Random) -> None:
    """Kill an engine again and again and bring it back."""
    while True:
        await asyncio.sleep(0.3)
        place = rng.randrange(len(running))
        before = running[place]
        await before.stop()
        await asyncio.sleep(0.1)
        ports = {"port": before.server.port, "bootstrap_port": before.bootstrap.port if before.bootstrap else 0}
        again = EmulatedWorker(replace(before.options, **ports))
        again.faults.set(dict.fromkeys(Fault, SHARE))
        await again.start()
        running[place] = again
        name = next(i.instance_id for i in gateway.scheduler.instances.values() if i.http.port == before.server.port)
        await until(lambda name=name: gateway.scheduler.instances[name].is_ready)


def open_sockets() -> int:
    return sum(os.readlink(path).startswith("socket:") for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_has_one_outcome_and_nothing_stays_behind(kind: str) -> None:
    async def work() -> tuple[Counter[str], int, Counter[tuple[str, str]], int]:
        rng = random.Random(f"faults of {kind}")
        before = open_sockets()
        async with AsyncExitStack() as stack:
            pairs = [*KINDS[kind], *KINDS[kind]]
            serving = behind_gateway(*pairs, gateway=GATEWAY, group={"in_flight": 8})
            gateway, running = await stack.enter_async_context(serving)
            ended: Counter[int] = Counter()
            note = gateway.app._ended
            gateway.app._ended = lambda call, *how: (ended.update([call.number]), note(call, *how))[1]
            for worker in running:
                worker.faults.set(dict.fromkeys(Fault, SHARE))
            losing = asyncio.ensure_future(lose_engines(gateway, running, rng))
            clients, places = Clients(gateway.server.address, rng), asyncio.Semaphore(AT_A_TIME)

            async def one() -> None:
                async with places:
                    await clients.send()

            await asyncio.gather(*(one() for _ in range(REQUESTS)))
            losing.cancel()
            await asyncio.gather(losing, return_exceptions=True)
            clients.close()
            await until(lambda: left_behind(gateway) == NOTHING)
            await until(lambda: gateway.server.connections == 0)
            outcomes = gateway.metrics.outcomes
            most = max(ended.values())
            for worker in running:
                await worker.stop()
        await asyncio.sleep(0)
        return clients.told, open_sockets() - before, outcomes, most

    told, sockets, outcomes, most = run(work(), limit_s=60 + REQUESTS / 10)
    print(kind, dict(told), {f"{how} {code}".strip(): count for (how, code), count in outcomes.items()})

    never_came = told.pop("no answer: connect", 0)
    assert sum(told.values()) == sum(outcomes.values()) == REQUESTS - never_came
    assert most == 1
    assert not [how for how in told if how.startswith("no answer")], "the gateway itself answers every request"
    assert told["answered"]
    assert sockets <= 0
