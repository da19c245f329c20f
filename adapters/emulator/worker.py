"""An emulated worker: vLLM's or SGLang's HTTP dialect in front of a virtual GPU (docs/emulator.md)."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from kairos.adapters.asgi import Receive, Scope, Send, answer, body_of, unless_gone
from kairos.adapters.asgi_server import AsgiServer
from kairos.adapters.emulator.answers import Answer, NativeAnswer, answer_json, error
from kairos.adapters.emulator.device import Device, Job
from kairos.adapters.emulator.faults import Fault, Faults
from kairos.adapters.emulator.generation import HANDSHAKE_S, Generation
from kairos.adapters.emulator.gpu import Limits, VirtualGpu
from kairos.adapters.emulator.handshakes import Connector, Leg, leg_of
from kairos.adapters.emulator.kv import KvDesk
from kairos.adapters.emulator.kv_events import KvEventPublisher
from kairos.adapters.emulator.metrics import loads, metrics_text
from kairos.adapters.emulator.prompts import (
    BLOCK_TOKENS,
    BadRequest,
    Prompt,
    from_native,
    output_limit,
    prompts_of,
    sequences_a_prompt,
)
from kairos.adapters.http_client import HttpPool, UpstreamError
from kairos.scheduler_core.config import KvTransfer
from kairos.scheduler_core.domain import StepTimes
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.prefix_cache import PrefixCache
from kairos.scheduler_core.telemetry import StepRecord

Engine = Literal["vllm", "sglang"]
Role = Literal["prefill", "decode", "mixed"]

_LARGEST_KV_BYTES = 2**40
VERSIONS: dict[Engine, str] = {"vllm": "0.32.0", "sglang": "0.5.23"}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What kind of worker it is."""

    engine: Engine
    role: Role
    models: tuple[str, ...]
    step_times: StepTimes
    limits: Limits = field(default_factory=Limits)
    connector: Literal["nixl", "mooncake"] = "nixl"
    """Of vLLM."""
    kv_transfer: KvTransfer = field(default_factory=KvTransfer)
    lease_s: float = 30.0
    prefix_cache: bool = False
    kv_events_port: int | None = None
    """Where it publishes what is in its prefix cache; 0 takes a free one, None: nowhere."""
    kv_replay_port: int | None = None
    time_scale: float = 1.0
    """Real seconds per second of the profile."""
    host: str = "127.0.0.1"
    port: int = 0
    bootstrap_port: int = 0
    """Where decode workers ask for KV (SGLang, Mooncake); 0 takes a free one."""
    faults: dict[Fault, float] = field(default_factory=dict)
    seed: int = 0
    on_step: Callable[[StepRecord], None] | None = None


class EmulatedWorker:
    """One worker.

    Args:
        device: what computes; None: a virtual GPU with the step times of the options.

    Raises:
        ConfigError: shares of faults that cannot be.
    """

    def __init__(self, options: WorkerOptions, device: Device | None = None) -> None:
        self.options = options
        self.gpu: Device = device or VirtualGpu(
            options.step_times, options.limits, options.time_scale, options.on_step, options.kv_transfer
        )
        self.desk = KvDesk(options.lease_s)
        self.faults = Faults(options.faults, options.seed)
        self.engine_id = uuid4().hex
        self.requests = 0
        self._cache = PrefixCache(options.limits.kv_tokens, BLOCK_TOKENS) if options.prefix_cache else None
        self.kv_events: KvEventPublisher | None = None
        self.connector: Connector | None = None
        if options.role != "mixed":
            self.connector = "sglang" if options.engine == "sglang" else options.connector
        self.server = AsgiServer(self, options.host, options.port, keep_alive_s=5)
        bootstraps = options.role == "prefill" and self.connector in ("mooncake", "sglang")
        self.bootstrap = AsgiServer(self, options.host, options.bootstrap_port, keep_alive_s=5) if bootstraps else None
        self._sources: dict[str, HttpPool] = {}
        self._routes: dict[tuple[str, str], Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("GET", "/version"): self._version,
            ("GET", "/server_info"): self._version,
            ("GET", "/v1/loads"): self._loads,
            ("GET", "/query"): self._query,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/generate"): self._native,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("PUT", "/emulated/faults"): self._set_faults,
        }

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        return self.server.address

    async def start(self) -> None:
        """Listen, and run steps.

        Raises:
            OSError: a port cannot be had.
        """
        self.gpu.start()
        if self.options.kv_events_port is not None:
            ports = self.options.kv_events_port, self.options.kv_replay_port
            self.kv_events = KvEventPublisher(self.options.host, *ports)
        await self.server.start()
        if self.bootstrap is not None:
            await self.bootstrap.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """End: requests get so long, then their connections are cut. Without grace this is how an engine dies."""
        if not grace_s:
            await self.gpu.stop()
        await self.server.stop(grace_s)
        if self.bootstrap is not None:
            await self.bootstrap.stop()
        await self.gpu.stop()
        if self.kv_events is not None:
            self.kv_events.close()
        for pool in self._sources.values():
            pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application, of its own port and of the bootstrap port."""
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None and scope["path"].startswith("/emulated/kv/"):
            route = self._kv
        if route is None:
            await answer_json(send, 404, {"detail": "Not Found"})
            return
        await route(scope, receive, send)

    # -- what an engine says of itself

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer_json(send, 200, {})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, 200, metrics_text(self).encode(), b"text/plain; version=0.0.4")

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        data = [{"id": model, "object": "model", "owned_by": self.options.engine} for model in self.options.models]
        await answer_json(send, 200, {"object": "list", "data": data})

    async def _version(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["path"] == "/version") != (self.options.engine == "vllm"):
            await answer_json(send, 404, {"detail": "Not Found"})
            return
        await answer_json(send, 200, {"version": VERSIONS[self.options.engine]})

    async def _loads(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.options.engine != "sglang":
            await answer_json(send, 404, {"detail": "Not Found"})
            return
        await answer_json(send, 200, loads(self))

    async def _query(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer_json(send, 200, {"0": {"engine_id": self.engine_id}})

    async def _set_faults(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            shares = json.loads(await body_of(receive))
            self.faults.set({Fault(kind): float(share) for kind, share in shares.items()})
        except (ValueError, AttributeError, TypeError, ConfigError) as problem:
            await answer_json(send, 400, error(400, str(problem)))
            return
        await answer_json(send, 200, {})

    async def _embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        data = [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]
        await answer_json(send, 200, {"object": "list", "data": data, "model": self.options.models[0]})

    # -- KV between workers

    async def _kv(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /emulated/kv/KEY/take|renew|wait`: what the engines' own transfer does outside HTTP."""
        key, _, action = scope["path"].removeprefix("/emulated/kv/").partition("/")
        await body_of(receive)
        now_s = time.monotonic()
        kv: bytes | None = b""
        if action == "renew":
            self.desk.renew(key, now_s)
        elif action == "take":
            kv = self.desk.take(key, now_s)
        else:
            kv = await unless_gone(self.desk.wait_and_take(key, HANDSHAKE_S), receive)
        await answer(send, 410 if kv is None else 200, kv or b"", b"application/octet-stream")

    async def _ask(self, leg: Leg, action: str) -> bytes | None:
        """What the holder of KV answers; None: it has none."""
        pool = self._sources.get(leg.source)
        if pool is None:
            pool = self._sources[leg.source] = HttpPool(leg.source)
        path = f"/emulated/kv/{leg.key}/{action}".encode()
        answer = await pool.send(b"POST", path, first_byte_s=HANDSHAKE_S)
        kv = await answer.body(_LARGEST_KV_BYTES)
        return kv if answer.status == 200 else None

    async def fetch(self, leg: Leg, job: Job) -> None:
        """Bring the KV of a prompt here; raises UpstreamError when its holder is gone or gives it up."""
        while True:  # held by its producer until there is room, renewed only while we step
            waits_since_s = time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.options.lease_s / 6):
                    await self.gpu.admit(job)
                    break
            if not leg.waits and self.gpu.last_step_s >= waits_since_s:
                await self._ask(leg, "renew")
        kv = await self._ask(leg, "wait" if leg.waits else "take")
        if leg.waits and kv is None:
            raise UpstreamError("lost", "the prefill leg failed")
        await self.gpu.receive(job, kv)

    # -- generation

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, chat=False)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, chat=True)

    async def _native(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.options.engine != "sglang":
            await answer_json(send, 404, {"detail": "Not Found"})
            return
        await self._generate(scope, receive, send, chat=False, native=True)

    async def _generate(self, scope: Scope, receive: Receive, send: Send, chat: bool, native: bool = False) -> None:
        self.requests += 1
        raw = await body_of(receive)
        fault = self.faults.draw()
        if fault is Fault.REFUSE:
            await answer_json(send, 503, error(503, "refused on purpose"))
            return
        if fault is Fault.HANG:
            await receive()
            return
        if fault is Fault.CUT and self.faults.early():
            self.server.cut(scope["client"])
            return
        try:
            body = json.loads(raw)
            if native:
                body = from_native(body) | {"model": self.options.models[0]}
            model = body.get("model")
            if model not in self.options.models:
                await answer_json(send, 404, error(404, f"The model `{model}` does not exist."))
                return
            prompts = prompts_of(body, chat)
            leg = leg_of(body, self.connector)
            jobs = self._jobs(prompts, sequences_a_prompt(body), output_limit(body), body, fault)
            if leg is not None and len(jobs) > 1:
                raise BadRequest("several sequences cannot be handed over")
        except (BadRequest, ValueError, AttributeError) as problem:
            await answer_json(send, 400, error(400, str(problem)))
            return
        except TypeError as problem:
            await answer_json(send, 500, error(500, str(problem)))
            return
        if leg is not None and self.options.role == "prefill":
            leg = Leg(True, leg.key, needs_decode_first=leg.needs_decode_first)
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", uuid4().hex.encode()).decode("latin-1")
        tells_ids = bool(body.get("return_token_ids"))
        says = NativeAnswer(request_id, jobs) if native else Answer(request_id, str(model), chat, tells_ids)
        run = Generation(self, says, jobs, leg, body, fault, scope["client"])
        try:
            await unless_gone(run.go(send), receive)
        finally:
            for job in jobs:
                self.gpu.abort(job)
            if leg is not None and leg.produces and not run.held:
                self.desk.fail(leg.key)

    def _jobs(self, prompts: list[Prompt], n: int, limit: int, body: dict[str, Any], fault: Fault | None) -> list[Job]:
        priority = body.get("priority") or 0
        if not isinstance(priority, int):
            raise BadRequest("priority must be an integer")
        if self.options.engine == "sglang":  # there the higher runs first
            priority = -priority
        jobs = []
        for prompt in prompts:
            for _ in range(n):
                job = self.gpu.job(prompt, limit, body)
                job.cached_tokens = self._hit(prompt)
                job.priority = priority
                job.slowness = 10.0 if fault is Fault.SLOW else 1.0
                jobs.append(job)
        return jobs

    def _hit(self, prompt: Prompt) -> int:
        if self._cache is None:
            return 0
        hit = self._cache.hit_tokens(prompt.blocks, prompt.tokens)
        first = next((place for place, block in enumerate(prompt.blocks) if block not in self._cache), None)
        gone = self._cache.use(prompt.blocks)
        if self.kv_events is not None:
            stored = [] if first is None else [self.kv_events.stored(prompt, first)]
            removed = [self.kv_events.removed(gone)] if gone else []
            if stored or removed:
                self.kv_events.publish(stored + removed)
        return hit
