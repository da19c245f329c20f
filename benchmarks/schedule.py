"""What one `POST /schedule` costs in CPU: against the raw floor, and against the same route in FastAPI with pydantic.

Every server gets the same body (200 waiting requests, 4 instances) over one kept-alive connection, decodes it with its
types and sends the same answer; `recorded` also hands it to the recorder of decisions, whose thread counts as well,
`kairos` decides too, and `kairos recorded` records what it decides, in SQLite. The floor is an asyncio protocol with
msgspec and no framework.
The servers run on one core, the client on another; CPU seconds are the server's own. Medians of the rounds.

Run: python benchmarks/schedule.py
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pydantic
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from kairos.scheduler_core.config import Settings, StoreSettings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.service.app import create_app
from kairos.scheduler_core.service.decisions.recorder import Recorder
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.plane import Database
from kairos.scheduler_core.service.routes.schedule import schedule_route
from kairos.scheduler_core.service.schedule import Decided, Scheduler
from kairos.scheduler_core.service.schemas import Answer, Snapshot
from kairos.scheduler_core.service.store.changes import Changes
from kairos.scheduler_core.service.store.revisions import require_served
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer

ROOT = Path(__file__).parent.parent
MOST_OVER_FLOOR, MOST_OF_PYDANTIC = 1.5, 0.35
"""The goals: of the route without the decision, with recording."""


def snapshot_of(requests: int, instances: int = 2) -> bytes:
    """A body with so many waiting requests, prefill and decode instances."""
    draw = random.Random(0)
    profile = "qwen3-32b-b300-tp4"
    fleet = [
        {"instance_id": f"prefill-{n}", "role": "prefill", "profile": profile, "chunk_tokens": 8192}
        for n in range(instances)
    ] + [
        {"instance_id": f"decode-{n}", "role": "decode", "profile": profile, "kv_tokens": 1_200_000}
        for n in range(instances)
    ]
    waiting = [
        {
            "request_id": f"request-{n:05d}",
            "arrival_s": round(100 - draw.uniform(0, 2), 3),
            "prompt_tokens": 1 + int(draw.lognormvariate(7.5, 1.0)),
            "slo_class": "default",
            "tenant": f"tenant-{n % 7}",
        }
        for n in range(requests)
    ]
    return json.dumps({"now_s": 100.0, "instances": fleet, "waiting": waiting}).encode()


def scheduler_of(settings: Settings) -> Scheduler:
    """The service's scheduler, without a service."""
    return Scheduler(settings, {name: s.as_strategy(name) for name, s in settings.strategies.items()})


class RawProtocol(asyncio.Protocol):
    """The floor: just enough HTTP to find the body, msgspec in and out."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._decode = msgspec.json.Decoder(Snapshot).decode
        self._encode = msgspec.json.Encoder().encode
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._decode(rest[:length])
        body = self._encode(self._answer)
        self._transport.write(  # type: ignore[attr-defined]  # a stream's transport
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


def pydantic_twin(struct: type[msgspec.Struct], made: dict[type, Any]) -> type[pydantic.BaseModel]:
    """The pydantic model with the same fields, types and limits as a msgspec struct."""
    if struct not in made:
        fields: dict[str, Any] = {}
        for field in msgspec.structs.fields(struct):
            default = ... if field.default is msgspec.NODEFAULT else field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = pydantic.Field(default_factory=field.default_factory)
            fields[field.name] = (_twin_type(field.type, made), default)
        forbid = pydantic.ConfigDict(extra="forbid")
        made[struct] = pydantic.create_model(struct.__name__, __config__=forbid, **fields)
    model: type[pydantic.BaseModel] = made[struct]
    return model


def _twin_type(kind: Any, made: dict[type, Any]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return pydantic_twin(kind, made)
    if origin is Annotated:
        inner, *metas = arguments
        limits = {
            name: getattr(meta, name)
            for meta in metas
            if isinstance(meta, msgspec.Meta)
            for name in ("gt", "ge", "le", "min_length", "max_length")
            if getattr(meta, name) is not None
        }
        twin = _twin_type(inner, made)
        return Annotated[twin, pydantic.Field(**limits)] if limits else twin
    if origin in (list, dict):
        return origin[tuple(_twin_type(argument, made) for argument in arguments)]
    if origin is Literal or origin is None or (isinstance(kind, type) and issubclass(kind, StrEnum)):
        return kind
    return Union[tuple(_twin_type(argument, made) for argument in arguments)]  # noqa: UP007  # made at run time


def pydantic_app(answer: Answer) -> FastAPI:
    """The route as one would write it with FastAPI alone."""
    app = FastAPI()
    made: dict[type, Any] = {}
    query, reply = pydantic_twin(Snapshot, made), pydantic_twin(Answer, made)
    ready = reply.model_validate(msgspec.to_builtins(answer))

    @app.post("/schedule")
    def schedule(snapshot: query) -> reply:  # type: ignore[valid-type]  # made at run time
        return ready

    return app


def settings_with_store(settings: Settings) -> Settings:
    """The settings with a database that ends with the process."""
    folder = tempfile.mkdtemp(prefix="kairos-")
    return settings.model_copy(update={"store": StoreSettings(url=SecretStr(f"sqlite:///{folder}/kairos.db"))})


def recorded_app(settings: Settings, answer: Answer) -> FastAPI:
    """The route with the answer made before, recorded as the service records it."""
    settings = settings_with_store(settings)
    scheduler = scheduler_of(settings)
    store = Store(settings.store.url.get_secret_value())  # type: ignore[union-attr]  # just given
    require_served(store)
    database = Database(store, Writer(store, 200_000), Changes(store))
    recorder = Recorder(database, settings.decisions, lambda: scheduler.profiles, Metrics())
    recorder.start()
    strategy = scheduler.strategy(None)

    def decide(snapshot: Snapshot, now_s: float, body: bytes) -> Answer:
        recorder.watch(Decided(now_s, snapshot, answer, strategy, [], 0.0))
        return answer

    app = FastAPI()
    app.router.routes.append(schedule_route(decide))
    return app


def serve(kind: str, port: int, body: bytes, marks: Connection) -> None:
    """Run one server on core 0; tell its CPU seconds whenever asked."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = load_settings(ROOT / "examples" / "kairos.yaml", {})
    answer = scheduler_of(settings).schedule(msgspec.json.decode(body, type=Snapshot), 0.0, body)

    def tell() -> None:
        while marks.recv():
            marks.send(time.process_time())
        os._exit(0)

    threading.Thread(target=tell, daemon=True).start()
    if kind == "raw":

        async def run() -> None:
            server = await asyncio.get_running_loop().create_server(lambda: RawProtocol(answer), "127.0.0.1", port)
            await server.serve_forever()

        asyncio.run(run())
        return
    if kind == "kairos":
        app = create_app(settings)
    elif kind == "kairos recorded":
        app = create_app(settings_with_store(settings))
    elif kind == "route":
        app = FastAPI()
        app.router.routes.append(schedule_route(lambda snapshot, now_s, body: answer))
    elif kind == "recorded":
        app = recorded_app(settings, answer)
    else:
        app = pydantic_app(answer)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


class Client:
    """One kept-alive connection."""

    def __init__(self, port: int, body: bytes) -> None:
        head = (
            f"POST /schedule HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        self._message = head.encode() + b"\r\n" + body
        self._socket = _connect(port)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")

    def ask(self) -> int:
        """Send the body once; the length of the answer."""
        self._socket.sendall(self._message)
        status = self._stream.readline()
        assert b" 200 " in status, status
        length = 0
        while (line := self._stream.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return len(self._stream.read(length))


def _connect(port: int) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


def cpu_us(kind: str, body: bytes, rounds: int, calls: int) -> list[float]:
    """Server CPU microseconds a call, of each round."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(kind, port, body, there), daemon=True)
    process.start()
    client = Client(port, body)

    def mark() -> float:
        here.send(True)
        return float(here.recv())

    for _ in range(calls // 4):
        client.ask()
    figures = []
    for _ in range(rounds):
        before_s = mark()
        for _ in range(calls):
            client.ask()
        figures.append((mark() - before_s) / calls * 1e6)
    here.send(False)
    process.join()
    return figures


def decision_us(body: bytes, rounds: int, calls: int) -> list[float]:
    """CPU microseconds of the decision alone, in this process."""
    scheduler = scheduler_of(load_settings(ROOT / "examples" / "kairos.yaml", {}))
    snapshot = msgspec.json.decode(body, type=Snapshot)
    return _rounds(lambda: scheduler.schedule(snapshot, 0.0, body), rounds, calls)


def _rounds(work: Callable[[], object], rounds: int, calls: int) -> list[float]:
    figures = []
    for _ in range(rounds):
        started_s = time.process_time()
        for _ in range(calls):
            work()
        figures.append((time.process_time() - started_s) / calls * 1e6)
    return figures


def main(arguments: Sequence[str]) -> None:
    """Measure, print the goals beside, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "schedule.json")
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    body = snapshot_of(200)
    measured = {
        kind: cpu_us(kind, body, options.rounds, options.calls)
        for kind in ("raw", "route", "recorded", "kairos", "kairos recorded", "pydantic")
    }
    measured["decision"] = decision_us(body, options.rounds, options.calls // 4)
    median = {kind: statistics.median(figures) for kind, figures in measured.items()}
    large = {n: statistics.median(decision_us(snapshot_of(n), 3, 1)) / 1e3 for n in (1_000, 10_000, 20_000)}
    over_floor, of_pydantic = median["recorded"] / median["raw"], median["recorded"] / median["pydantic"]
    print("POST /schedule, 200 waiting requests, CPU us a call (median of rounds)")
    print(f"  raw protocol + msgspec             {median['raw']:8.0f}")
    print(f"  our route, answer made before      {median['route']:8.0f}")
    print(f"  the same, recorded                 {median['recorded']:8.0f}")
    print(f"  FastAPI + pydantic, the same       {median['pydantic']:8.0f}")
    print(f"  our route with the decision        {median['kairos']:8.0f}   the decision alone {median['decision']:.0f}")
    print(f"  the same, recorded                 {median['kairos recorded']:8.0f}")
    print(f"  recorded / raw       {over_floor:5.2f}   goal <= {MOST_OVER_FLOOR}")
    print(f"  recorded / pydantic  {of_pydantic:5.2f}   goal <= {MOST_OF_PYDANTIC}")
    print("decision alone, CPU ms: " + ", ".join(f"{n:,} waiting {ms:.0f}" for n, ms in large.items()))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    options.out.write_text(
        json.dumps(
            {
                "commit": git.stdout.strip(),
                "command": "python benchmarks/schedule.py",
                "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.system()},
                "body_bytes": len(body),
                "cpu_us": {kind: {"median": median[kind], "rounds": rounds} for kind, rounds in measured.items()},
                "decision_ms": large,
                "ratios": {"recorded_over_raw": over_floor, "recorded_over_pydantic": of_pydantic},
                "goals": {"recorded_over_raw": MOST_OVER_FLOOR, "recorded_over_pydantic": MOST_OF_PYDANTIC},
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
