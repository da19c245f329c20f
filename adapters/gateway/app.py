"""The gateway's HTTP side: routes, bodies, and one recorded outcome for every request (docs/gateway.md)."""

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from kairos.adapters.gateway import dialects
from kairos.adapters.gateway.bodies import Body
from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.counting import TokenCounter
from kairos.adapters.gateway.errors import CallError, EngineRefusal, error_body
from kairos.adapters.gateway.instances import LiveInstance, PrefillSide
from kairos.adapters.gateway.kv_events import token_blocks
from kairos.adapters.gateway.metrics import GatewayMetrics
from kairos.adapters.gateway.native import NativeBody
from kairos.adapters.gateway.prefixes import block_ids
from kairos.adapters.gateway.relay import JSON, Relay, Reply
from kairos.adapters.gateway.scheduling import Scheduler
from kairos.adapters.gateway.tokens import TokenEstimates
from kairos.adapters.gateway.trust import Headers, Identity, Trust, request_id_of, trace_lines
from kairos.adapters.http_client import UpstreamError, header_lines
from kairos.adapters.http_server import BodyFault, Limits, Request, Work
from kairos.scheduler_core.config import GatewaySettings

_GENERATION = {b"/v1/completions": False, b"/v1/chat/completions": True, b"/generate": False}
"""Paths whose requests are ordered, and whether they are chats."""
_NATIVE = b"/generate"
"""That of SGLang's own API."""

_RELAYED = frozenset(
    {
        *(b"/v1/embeddings", b"/v1/responses", b"/v1/messages", b"/v1/messages/count_tokens", b"/v1/rerank"),
        *(b"/v2/rerank", b"/v1/score", b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/audio/speech"),
        *(b"/rerank", b"/score", b"/pooling", b"/classify", b"/tokenize", b"/detokenize"),
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
    """What answers the gateway's requests.

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
        self.others = 0
        """Requests of other paths that have not ended."""
        self.draining = False
        self.divide: Callable[[Call, Headers], None] | None = None
        """Says which part of the fleet a request belongs to, while an experiment divides it."""
        self._scheduler = scheduler
        self._relay = relay
        self._tokens = tokens
        self.counters = counters
        self._metrics = metrics
        self._ended = ended
        self._metrics_text = metrics_text
        self._numbers = itertools.count(1)

    # -- of the server

    def begin(self, request: Request) -> Work | None:
        """Say what serves a request once its body is here, or answer it now."""
        path, post = request.path, request.method == b"POST"
        try:
            if post and (chat := _GENERATION.get(path)) is not None:
                return partial(self._generate, request, chat, self._let_in(request))
            if post and path in _RELAYED:
                self._metrics.relayed[path.decode()] += 1
                self._let_in(request)
                return partial(self._pass_on, request)
            if request.method == b"GET" and path in (b"/health", b"/metrics", b"/v1/models"):
                self._look(request)
                return None
            raise CallError(404, "not_found", "the gateway has no such path")
        except CallError as problem:
            self._refuse(request, problem)
            return None

    def refuse(self, request: Request, fault: BodyFault) -> None:
        """Refuse a request for its body."""
        self._refuse(request, _fault(fault, limits_of(self.settings)))

    def _refuse(self, request: Request, problem: CallError) -> None:
        """Answer a request that nothing was done for."""
        if request.method == b"POST" and request.path in _GENERATION:
            left = problem.code == "client_left"
            self._metrics.outcomes[Outcome.CLIENT_LEFT if left else Outcome.REFUSED, problem.code] += 1
        _answer_error(request, problem)

    def _let_in(self, request: Request) -> Identity:
        if self.draining:
            raise CallError(503, "shutting_down", "the gateway is ending", 1)
        return self.trust.identify(request.fields, request.client)

    # -- requests for tokens

    async def _generate(self, request: Request, chat: bool, identity: Identity) -> None:
        try:
            call = await self._taken(request, identity, chat)
        except CallError as problem:
            self._refuse(request, problem)
            return
        reply = Reply(call, request)
        call.task = request.task
        request.left = call.client_left
        self.calls[call.number] = call
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
            reply.error(error)
        except BaseException:
            outcome, code = Outcome.FAILED, "bug"
            raise
        finally:
            call.task = None  # which serves other requests now
            self._scheduler.release(call)
            del self.calls[call.number]
            self._ended(call, outcome, code)

    async def _taken(self, request: Request, identity: Identity, chat: bool) -> Call:
        """A request that may wait.

        Raises:
            CallError: it may not.
        """
        headers, arrival_s = request.fields, request.arrived_s
        try:
            body = NativeBody(request.body, self._native_model()) if request.path == _NATIVE else Body(request.body)
            text = body.text(chat)
        except RecursionError:
            raise CallError(400, "invalid_json", "the body is nested too deeply") from None
        call = Call(next(self._numbers), request_id_of(headers), request.path, chat, body, text, arrival_s)
        self.trust.set_targets(call, identity, headers)
        call.trace_lines = trace_lines(headers)
        if self.divide is not None:
            self.divide(call, headers)
        call.total_deadline_s = arrival_s + self.settings.timeouts.total_s
        call.prompt_tokens = self._tokens.tokens(body.model, text)
        sides = self._scheduler.prefix_sides
        if self.counters or sides:
            await self._count(call, sides)
        if sides and any(side.index is not None for side in sides):
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

    def _look(self, request: Request) -> None:
        if request.path == b"/metrics":
            text = self._metrics_text().encode()
            request.answer(200, b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n", text)
            return
        if request.path == b"/health":
            status = 503 if self.draining or not self._scheduler.pools else 200
            request.answer(status, JSON, json.dumps(self.health()).encode())
            return
        self.trust.identify(request.fields, request.client)
        models = sorted({model for pool in self._scheduler.pools for model in pool.serves})
        data = [{"id": model, "object": "model", "created": 0, "owned_by": "kairos"} for model in models]
        request.answer(200, JSON, json.dumps({"object": "list", "data": data}).encode())

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

    async def _pass_on(self, request: Request) -> None:
        """Relay a request as it is, to the least loaded instance that serves its model."""
        try:
            instance = self._least_loaded(_model_of(request.fields, request.body))
        except CallError as problem:
            _answer_error(request, problem)
            return
        self.others += 1
        instance.relayed += 1
        try:
            await self._relay_to(instance, request)
        except (CallError, UpstreamError) as problem:
            if request.began:
                request.break_off()
            elif isinstance(problem, CallError):
                _answer_error(request, problem)
            else:
                _answer_error(request, CallError(502, "engine_lost", "the engine did not answer"))
        finally:
            self.others -= 1
            instance.relayed -= 1

    async def _relay_to(self, instance: LiveInstance, request: Request) -> None:
        timeouts = self.settings.timeouts
        response = await instance.http.send(
            b"POST",
            request.target,
            dialects.passed_on(_public(request.headers), instance),
            request.body,
            first_byte_s=timeouts.total_s,
            idle_s=timeouts.idle_s,
        )
        try:
            if response.status in (401, 403):
                raise CallError(502, "engine_key", "the engine does not take the gateway's key")
            kept = [pair for pair in response.headers if pair[0] not in _HOP_BY_HOP and pair[0] != b"set-cookie"]
            request.begin(response.status, header_lines(kept), response)
            await response.pipe(request.piece)
        finally:
            response.close()

    def _least_loaded(self, model: str) -> LiveInstance:
        ready = [instance for instance in self._scheduler.instances.values() if instance.is_ready]
        able = [instance for instance in ready if not model or model in instance.serves]
        if not able:
            known = not ready or not model
            raise CallError(
                503 if known else 404, "no_instance" if known else "model_not_found", "no instance serves it"
            )
        return min(able, key=lambda instance: (instance.role != "mixed", instance.requests))


def _outcome_of(error: CallError, call: Call) -> Outcome:
    if error.code == "client_left":
        return Outcome.CLIENT_LEFT
    refused = isinstance(error, EngineRefusal) or (not call.attempts and error.status < 500) or not call.dispatch_s
    return Outcome.REFUSED if refused else Outcome.FAILED


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


def limits_of(settings: GatewaySettings) -> Limits:
    """What clients may take."""
    return Limits(settings.max_body_bytes, settings.timeouts.total_s, settings.timeouts.idle_s)


def _fault(fault: BodyFault, limits: Limits) -> CallError:
    if fault == "too_large":
        return CallError(413, "body_too_large", f"the body is larger than {limits.body_bytes} bytes")
    if fault == "too_slow":
        took = f"a piece of the body took {limits.idle_s:g} s, or all {limits.body_s:g} s"
        return CallError(408, "body_too_slow", took)
    return CallError(499, "client_left", "the client left")


def _answer_error(request: Request, problem: CallError) -> None:
    lines = JSON if problem.retry_after_s is None else JSON + b"retry-after: %d\r\n" % problem.retry_after_s
    if problem.status == 401:
        lines += b"www-authenticate: Bearer\r\n"
    request.answer(problem.status, lines, error_body(problem))
