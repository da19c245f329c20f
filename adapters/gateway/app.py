"""The gateway's HTTP side: routes, bodies, and one recorded outcome for every request (docs/gateway.md)."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from kairos.adapters.asgi import Headers, Receive, Scope, Send, answer, unless_gone
from kairos.adapters.gateway import dialects
from kairos.adapters.gateway.bodies import Body, read_body
from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.counting import TokenCounter
from kairos.adapters.gateway.errors import CallError, EngineRefusal, error_body
from kairos.adapters.gateway.instances import LiveInstance, PrefillSide
from kairos.adapters.gateway.kv_events import token_blocks
from kairos.adapters.gateway.metrics import GatewayMetrics
from kairos.adapters.gateway.native import NativeBody
from kairos.adapters.gateway.prefixes import block_ids
from kairos.adapters.gateway.relay import Relay, Reply
from kairos.adapters.gateway.scheduling import Scheduler
from kairos.adapters.gateway.tokens import TokenEstimates
from kairos.adapters.gateway.trust import Trust, request_id_of, trace_headers
from kairos.adapters.http_client import UpstreamError
from kairos.scheduler_core.config import GatewaySettings

_GENERATION = {"/v1/completions": False, "/v1/chat/completions": True, "/generate": False}
"""Paths whose requests are ordered, and whether they are chats."""
_NATIVE = "/generate"
"""That of SGLang's own API."""

_RELAYED = frozenset(
    {
        *("/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/rerank", "/v2/rerank"),
        *("/v1/score", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech"),
        *("/rerank", "/score", "/pooling", "/classify", "/tokenize", "/detokenize"),
    }
)
"""Paths that go unchanged to the least loaded instance; an engine's other paths are its operator's."""

_AT_ONCE_TOKENS = 4096
"""The blocks of longer prompts are found in a thread."""

_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"accept-encoding"),
    }
)
_PRIVATE = re.compile(
    rb"authorization|cookie|x-api-key|api-key|forwarded|x-forwarded-.*|x-real-ip"
    rb"|x-kairos-.*|x-gateway-.*|x-override-.*|x-prefiller-host-port|x-data-parallel-rank|x-vllm-priority"
)
"""Headers that end at the gateway: the client's keys, and what Kairos and engines tell one another."""

_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')

Ended = Callable[[Call, Outcome, str], None]


class App:
    """The ASGI application.

    Args:
        counters: of the models whose tokens are counted and not estimated.
        ended: told every request for tokens once, when it has ended, with its outcome and code.
        metrics_text: Prometheus text of everything.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        trust: Trust,
        scheduler: Scheduler,
        relay: Relay,
        tokens: TokenEstimates,
        counters: Mapping[str, TokenCounter],
        metrics: GatewayMetrics,
        ended: Ended,
        metrics_text: Callable[[], str],
    ) -> None:
        self.settings = settings
        self.trust = trust
        self.calls: dict[int, Call] = {}
        """Requests for tokens that have not ended."""
        self._receives: dict[int, Receive] = {}
        self.others = 0
        """Requests of other paths that have not ended."""
        self.draining = False
        self.divide: Callable[[Call, Headers], None] | None = None
        """Says which half of the fleet a request belongs to, while an experiment divides it."""
        self._scheduler = scheduler
        self._relay = relay
        self._tokens = tokens
        self.counters = counters
        self._metrics = metrics
        self._ended = ended
        self._metrics_text = metrics_text
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path, method = scope["path"], scope["method"]
        chat = _GENERATION.get(path)
        if chat is not None and method == "POST":
            await self._generate(scope, receive, send, chat)
        elif method == "GET" and path in ("/health", "/metrics", "/v1/models"):
            await self._look(scope, send)
        elif path in _RELAYED and method == "POST":
            await self._pass_on(scope, receive, send)
        else:
            await _refuse(send, CallError(404, "not_found", "the gateway has no such path"))

    # -- requests for tokens

    async def _generate(self, scope: Scope, receive: Receive, send: Send, chat: bool) -> None:
        arrival_s = time.monotonic()
        headers: Headers = dict(scope["headers"])
        try:
            call = await self._taken(scope, receive, headers, chat, arrival_s)
        except CallError as problem:
            left = problem.code == "client_left"
            self._metrics.outcomes[Outcome.CLIENT_LEFT if left else Outcome.REFUSED, problem.code] += 1
            await _refuse(send, problem)
            return
        reply = Reply(call, send)
        call.task = asyncio.current_task()
        self.calls[call.number] = call
        self._receives[call.number] = receive
        outcome, code = Outcome.FINISHED, ""
        try:
            await self._relay.serve(call, reply)
            self._learn(call)
        except (CallError, asyncio.CancelledError) as problem:
            error = call.interruption or problem
            if not isinstance(error, CallError):
                outcome, code = Outcome.FAILED, "stopped"
                raise
            code = error.code
            outcome = _outcome_of(error, call)
            if call.interruption is not None and call.task is not None and call.task.cancelling():
                call.task.uncancel()
            if outcome is not Outcome.CLIENT_LEFT:
                await reply.error(error)
        except BaseException:
            outcome, code = Outcome.FAILED, "bug"
            raise
        finally:
            if call.watch is not None:
                call.watch.cancel()
            self._scheduler.release(call)
            del self.calls[call.number], self._receives[call.number]
            self._ended(call, outcome, code)

    def watch_clients(self) -> None:
        """Watch for the clients of requests that are here since the last call to leave: most need no watch."""
        for number, call in self.calls.items():
            if call.watch is None:
                call.watch = asyncio.get_running_loop().create_task(_gone(call, self._receives[number]))

    async def _taken(self, scope: Scope, receive: Receive, headers: Headers, chat: bool, arrival_s: float) -> Call:
        """A request that may wait.

        Raises:
            CallError: it may not.
        """
        if self.draining:
            raise CallError(503, "shutting_down", "the gateway is ending", 1)
        identity = self.trust.identify(headers, _client(scope))
        raw = await self._body(receive, headers)
        try:
            body = NativeBody(raw, self._native_model()) if scope["path"] == _NATIVE else Body(raw)
            text = body.text(chat)
        except RecursionError:
            raise CallError(400, "invalid_json", "the body is nested too deeply") from None
        number, path = next(self._numbers), scope["path"].encode()
        call = Call(number, request_id_of(headers), path, chat, body, text, arrival_s)
        self.trust.set_targets(call, identity, headers)
        call.trace_headers = trace_headers(headers)
        if self.divide is not None:
            self.divide(call, headers)
        call.total_deadline_s = arrival_s + self.settings.timeouts.total_s
        call.prompt_tokens = self._tokens.tokens(body.model, text)
        sides = self._scheduler.prefix_sides
        if self.counters or sides:
            await self._count(call, sides)
        if any(side.index is not None for side in sides):
            prefix = body.prefix(chat)
            call.prompt_bytes = max(1, sum(map(len, prefix)))
            call.blocks = block_ids(prefix)
        return call

    async def _count(self, call: Call, sides: Sequence[PrefillSide]) -> None:
        """Count the tokens of a prompt where that can be done, and find their blocks."""
        prompts: Sequence[Sequence[int]] | None = None
        sizes = {side.kv_events.stored.block_tokens for side in sides if side.kv_events is not None} - {0}
        if call.text.tokens:
            prompts = call.body.token_prompts() if sizes else None
        elif (counter := self.counters.get(call.model)) is not None:
            prompts = await counter.tokens(call.body, call.chat)
            if prompts is None:
                self._metrics.uncounted[call.model] += 1
            else:
                media_tokens = call.text.media * self.settings.media_tokens
                call.prompt_tokens = max(1, sum(map(len, prompts)) + media_tokens)
        if prompts is not None and len(prompts) == 1 and not call.text.media and not call.body.is_salted:
            adapter = call.model if call.model in self._adapters() else ""
            tokens = prompts[0]
            for size in sizes:
                with suppress(OverflowError):  # no token has such a number: its engine says so
                    if len(tokens) <= _AT_ONCE_TOKENS:
                        call.token_blocks[size] = token_blocks(tokens, size, adapter)
                    else:
                        call.token_blocks[size] = await asyncio.to_thread(token_blocks, tokens, size, adapter)

    def _native_model(self) -> str:
        """The model of SGLang engines where there is only one.

        Raises:
            CallError: there is no such engine.
        """
        found = {name for i in self._scheduler.instances.values() if i.engine == "sglang" for name in i.serves}
        if not found:
            raise CallError(404, "not_found", "no SGLang engine is behind this gateway; use /v1/completions")
        return found.pop() if len(found) == 1 else ""

    def _adapters(self) -> set[str]:
        return {name for instance in self._scheduler.instances.values() for name in instance.group.adapters}

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        timeouts = self.settings.timeouts
        return await read_body(receive, headers, self.settings.max_body_bytes, timeouts.idle_s, timeouts.total_s)

    def _learn(self, call: Call) -> None:
        """Take in what the engine counted."""
        usage = call.usage
        if usage is None or not usage.prompt_tokens:
            return
        self._tokens.learn(call.model, call.text, usage.prompt_tokens)
        side = call.prefill.prefill if call.prefill is not None else None
        if side is not None and side.index is not None and usage.cached_tokens is not None:
            side.index.correct(call.expected_cached_tokens, usage.cached_tokens)

    # -- everything else

    async def _look(self, scope: Scope, send: Send) -> None:
        path = scope["path"]
        if path == "/metrics":
            await answer(send, 200, self._metrics_text().encode(), b"text/plain; version=0.0.4; charset=utf-8")
            return
        if path == "/health":
            status = 503 if self.draining or not self._scheduler.pools else 200
            await answer(send, status, json.dumps(self.health()).encode())
            return
        try:
            self.trust.identify(dict(scope["headers"]), _client(scope))
        except CallError as problem:
            await _refuse(send, problem)
            return
        models = sorted({model for pool in self._scheduler.pools for model in pool.serves})
        data = [{"id": model, "object": "model", "created": 0, "owned_by": "kairos"} for model in models]
        await answer(send, 200, json.dumps({"object": "list", "data": data}).encode())

    def health(self) -> dict[str, object]:
        """What works and what does not."""
        instances = self._scheduler.instances.values()
        return {
            "status": "draining" if self.draining else "ready" if self._scheduler.pools else "no_instance",
            "strategy": self._scheduler.decider.strategy.name,
            "notes": self._scheduler.notes(),
            "instances": {
                i.instance_id: {"state": i.state, "engine": f"{i.engine} {i.version}".strip(), "problem": i.problem}
                for i in instances
            },
        }

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay a request as it is, to the least loaded instance that serves its model."""
        headers: Headers = dict(scope["headers"])
        self._metrics.relayed[scope["path"]] += 1
        try:
            if self.draining:
                raise CallError(503, "shutting_down", "the gateway is ending", 1)
            self.trust.identify(headers, _client(scope))
            raw = await self._body(receive, headers)
            instance = self._least_loaded(_model_of(headers, raw))
        except CallError as problem:
            await _refuse(send, problem)
            return
        self.others += 1
        instance.relayed += 1
        try:
            await unless_gone(self._relay_to(instance, scope, raw, send), receive)
        finally:
            self.others -= 1
            instance.relayed -= 1

    async def _relay_to(self, instance: LiveInstance, scope: Scope, raw: bytes, send: Send) -> None:
        began = False
        try:
            response = await instance.http.send(
                b"POST",
                scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b""),
                dialects.passed_on(_public(scope["headers"]), instance),
                raw,
                first_byte_s=self.settings.timeouts.total_s,
                idle_s=self.settings.timeouts.idle_s,
            )
            try:
                if response.status in (401, 403):
                    raise CallError(502, "engine_key", "the engine does not take the gateway's key")
                kept = [pair for pair in response.headers if pair[0] not in _HOP_BY_HOP and pair[0] != b"set-cookie"]
                began = True
                await send({"type": "http.response.start", "status": response.status, "headers": kept})
                while data := await response.chunk():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                response.close()
        except (CallError, UpstreamError) as problem:
            if began:  # the connection ends: only so does the client learn that there should be more
                raise ConnectionAbortedError("the engine's answer ended before its end") from None
            if isinstance(problem, UpstreamError):
                problem = CallError(502, "engine_lost", "the engine did not answer")
            await _refuse(send, problem)

    def _least_loaded(self, model: str) -> LiveInstance:
        ready = [instance for instance in self._scheduler.instances.values() if instance.is_ready]
        able = [instance for instance in ready if not model or model in instance.serves]
        if not able:
            known = not ready or not model
            raise CallError(
                503 if known else 404, "no_instance" if known else "model_not_found", "no instance serves it"
            )
        return min(able, key=lambda instance: (instance.role != "mixed", instance.requests))


async def _gone(call: Call, receive: Receive) -> None:
    """Stop a request when its client leaves; a server says the same when the answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.interrupt(CallError(499, "client_left", "the client left"))


def _outcome_of(error: CallError, call: Call) -> Outcome:
    if error.code == "client_left":
        return Outcome.CLIENT_LEFT
    refused = isinstance(error, EngineRefusal) or (not call.attempts and error.status < 500) or not call.dispatch_s
    return Outcome.REFUSED if refused else Outcome.FAILED


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _public(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    named = {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
    return [
        (name, value)
        for name, value in headers
        if name not in _HOP_BY_HOP and name not in named and not _PRIVATE.fullmatch(name)
    ]


def _model_of(headers: Headers, raw: bytes) -> str:
    """The model that a body of JSON or a form names; empty when it names none."""
    if b"json" in headers.get(b"content-type", b""):
        try:
            return Body(raw).model
        except CallError as problem:
            if problem.code == "model_missing":
                return ""
            raise
    match = _FORM_MODEL.search(raw[:65536])
    return match[1].decode("utf-8", "replace") if match else ""


async def _refuse(send: Send, problem: CallError) -> None:
    extra = [] if problem.retry_after_s is None else [(b"retry-after", b"%d" % problem.retry_after_s)]
    if problem.status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    await answer(send, problem.status, error_body(problem), extra=extra)
