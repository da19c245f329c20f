"""One request from its turn to its last byte: prefill leg, decode leg, first token, retry, end.

The head of the answer is held back until the first token is here: until then the request can be tried once more, and
what fails has a status of its own. From then on bytes pass as they come.
"""

import asyncio
import time
from collections.abc import Callable

from kairos.adapters.gateway import dialects
from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.dialects import Message
from kairos.adapters.gateway.errors import CallError, EngineRefusal, error_body, error_event
from kairos.adapters.gateway.instances import DecodeSide, LiveInstance
from kairos.adapters.gateway.leases import KvGrant, expired_error
from kairos.adapters.gateway.scheduling import Scheduler
from kairos.adapters.http_client import Response, UpstreamError
from kairos.adapters.http_server import Request
from kairos.scheduler_core.config import Timeouts
from kairos.scheduler_core.slo import NO_TARGET_S

_ATTEMPTS = 2
JSON = b"content-type: application/json\r\n"
_SSE = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class Reply:
    """The answer to the client; its head goes out with the first bytes."""

    __slots__ = ("_call", "_request", "began", "chunk", "is_chunked", "piece")

    def __init__(self, call: Call, request: Request) -> None:
        self._call = call
        self._request = request
        self.piece = request.piece
        """Sends a piece of a stream that has begun, the last one or not."""
        self.chunk = request.chunk
        """Sends one that is framed as a chunk, where those of this answer are (`is_chunked`)."""
        self.is_chunked = request.is_chunked
        self.began = False
        """The client has the head of a stream."""

    def whole(self, status: int, body: bytes, lines: bytes = b"") -> None:
        """An answer in one piece."""
        self._call.answered = True
        self._request.answer(status, JSON + told(self._call) + lines, body)

    def begin(self, response: Response, data: bytes, last: bool) -> None:
        """Begin a stream that comes from an engine, with its first piece, which may be the last."""
        self.began = True
        self._request.begin(200, _SSE + told(self._call), response, data, last)

    def error(self, error: CallError) -> None:
        """An error: an answer of its own, or the event that ends a stream; nothing after the end."""
        if self._call.answered:
            return
        if self.began:
            self._call.answered = True
            self.piece(error_event(error), last=True)
            return
        retry = b"" if error.retry_after_s is None else b"retry-after: %d\r\n" % error.retry_after_s
        self.whole(error.status, error_body(error), retry)


def told(call: Call) -> bytes:
    """The headers that say what was decided."""
    request_id = call.request_id.encode()
    lines = b"x-request-id: %b\r\nx-kairos-request-id: %b\r\nx-kairos-decision-us: %d\r\n" % (
        request_id,
        request_id,
        call.decision_us,
    )
    if call.dispatch_s:
        lines += b"x-kairos-waited-s: %.6f\r\n" % (call.dispatch_s - call.arrival_s)
    if call.prefill is not None:
        lines += call.prefill.prefill_line
    if call.decode is not None:
        lines += call.decode.decode_line
    return lines


class Relay:
    """Serves requests from the scheduler's decisions.

    Args:
        lease_s: how long a NIXL prefill engine holds KV.
        suspect: told an instance that failed a request.
    """

    def __init__(
        self, scheduler: Scheduler, timeouts: Timeouts, lease_s: float, suspect: Callable[[LiveInstance, str], None]
    ) -> None:
        self._scheduler = scheduler
        self.timeouts = timeouts
        self._lease_s = lease_s
        self._suspect = suspect
        self.retries = 0

    async def serve(self, call: Call, reply: Reply) -> None:
        """Answer a request, trying once more what fails before its first token.

        Raises:
            CallError: it has no (whole) answer; nobody has told the client.
            CancelledError: the task was stopped by someone else than `call.interrupt`.
        """
        self._scheduler.arrive(call)
        while True:
            call.attempts += 1
            try:
                await self._attempt(call, reply)
                return
            except CallError as problem:
                error = problem
            except UpstreamError as problem:
                error = _as_error(problem)
            except asyncio.CancelledError:
                if call.interruption is None or call.task is None:
                    raise
                error, call.interruption = call.interruption, None
                call.task.uncancel()
            if error.code == "engine_unreachable":  # nothing was sent; it is out of the queues now
                call.attempts -= 1
            if reply.began or call.attempts >= _ATTEMPTS or not error.may_retry:
                raise error
            self._scheduler.again(call)
            self.retries += 1

    async def _attempt(self, call: Call, reply: Reply) -> None:
        if call.prefill is None:
            call.turn = asyncio.get_running_loop().create_future()
            await call.turn
        prefill = call.prefill
        assert prefill is not None
        call.deadline_s = call.dispatch_s + self.timeouts.first_token_s
        if call.ttft_target_s < self.timeouts.total_s:
            call.deadline_s += call.ttft_target_s
        try:
            if prefill.role == "mixed":
                await self._alone(call, prefill, reply)
            elif prefill.handshake == "nixl":
                await self._serial(call, prefill, reply)
            else:
                await self._concurrent(call, prefill, reply)
        finally:
            call.deadline_s = NO_TARGET_S
            call.grant = None

    # -- handshakes

    async def _alone(self, call: Call, instance: LiveInstance, reply: Reply) -> None:
        """Both stages on one instance. Without a stream nobody sees the prompt end."""
        assert instance.decode is not None
        if not call.body.stream:
            call.deadline_s = NO_TARGET_S
            self._scheduler.prefill_ends_unseen(call, instance)
        response = await self._ask(call, instance, dialects.alone(call, instance))
        await self._answer(call, response, instance, instance.decode, reply)

    async def _serial(self, call: Call, prefill: LiveInstance, reply: Reply) -> None:
        body = await self._body(call, await self._ask(call, prefill, dialects.nixl_prefill(call, prefill)), prefill)
        params, call.usage = dialects.nixl_params(body)
        if call.usage is not None and call.usage.prompt_tokens:
            call.prompt_tokens = call.usage.prompt_tokens  # by the engine's count from here on
        now_s = time.monotonic()
        call.grant = KvGrant(params, self._lease_s, now_s)
        self._scheduler.prefill_ended(call)
        side = self._scheduler.place_decode(call)
        decode = call.decode
        assert decode is not None
        if not call.body.stream:
            call.deadline_s = NO_TARGET_S
        message = dialects.nixl_decode(call, decode, call.grant.take(now_s))
        if not call.body.stream and not side.tells_steps:  # nobody could see that it is decoded in time
            call.grant = None
        response = await self._ask(call, decode, message)
        await self._answer(call, response, decode, side, reply)

    async def _concurrent(self, call: Call, prefill: LiveInstance, reply: Reply) -> None:
        """Both legs at once; when one fails the other is given up."""
        side = self._scheduler.place_decode(call)
        decode = call.decode
        assert decode is not None
        first, second = dialects.both_legs(call, prefill, decode)
        if not call.body.stream:
            call.deadline_s = NO_TARGET_S
        leg = await self._ask(call, prefill, first)
        leg.when_ended(lambda: self._leg_ended(call, leg, prefill))
        try:
            response = await self._ask(call, decode, second)
            await self._answer(call, response, decode, side, reply)
        except BaseException:
            leg.close()
            raise

    def _leg_ended(self, call: Call, leg: Response, prefill: LiveInstance) -> None:
        """Give the decode leg up when the prefill leg beside it has failed, unless its KV was there."""
        if isinstance(leg.problem, UpstreamError):
            self._failed(call, prefill, leg.problem)
            error = _as_error(leg.problem)
        elif leg.status == 200:
            self._scheduler.prefill_ended(call)
            return
        else:
            call.failed_on.add(prefill.instance_id)
            error = _refusal(leg.status, leg.taken())
        if not call.first_token_s:
            call.interrupt(error)

    # -- answers

    async def _ask(self, call: Call, instance: LiveInstance, message: Message) -> Response:
        try:
            return await instance.http.start(
                b"POST",
                call.path,
                message.lines,
                message.body,
                first_byte_s=self.timeouts.total_s,
                idle_s=self.timeouts.idle_s,
            )
        except UpstreamError as problem:
            self._failed(call, instance, problem)
            raise

    async def _body(self, call: Call, response: Response, instance: LiveInstance) -> bytes:
        """The body of a good answer."""
        try:
            body = await response.body()
        except UpstreamError as problem:
            self._failed(call, instance, problem)
            raise
        finally:
            response.close()
        if response.status != 200:
            call.failed_on.add(instance.instance_id)
            raise _refusal(response.status, body)
        return body

    def _failed(self, call: Call, instance: LiveInstance, problem: UpstreamError) -> None:
        call.failed_on.add(instance.instance_id)
        self._suspect(instance, problem.kind)

    async def _answer(
        self, call: Call, response: Response, instance: LiveInstance, side: DecodeSide, reply: Reply
    ) -> None:
        """Pass an engine's answer on."""
        if call.body.stream:
            await self._stream(call, response, instance, side, reply)
            return
        body = await self._body(call, response, instance)
        self._first_token(call, side)
        call.usage = call.body.usage_in(body) or call.usage
        call.output_tokens = call.usage.completion_tokens or 0 if call.usage else 0
        call.last_token_s = call.first_token_s
        reply.whole(200, body)

    async def _stream(
        self, call: Call, response: Response, instance: LiveInstance, side: DecodeSide, reply: Reply
    ) -> None:
        """Pass a stream on: each piece goes to the client in the moment it comes."""
        relayed = call.body.reader()
        held: list[bytes] = []
        last_token_s = 0.0
        send_chunk = reply.chunk

        def passed(data: bytes, last: bool) -> None:
            nonlocal last_token_s
            try:
                before = relayed.events
                data = relayed.feed(data)
                if relayed.events > before:
                    if call.first_token_s:
                        last_token_s = side.produced(relayed.events - before)
                    else:
                        call.output_tokens = relayed.events
                        self._first_token(call, side)
                        last_token_s = call.first_token_s
                ended = last and relayed.done
                if not reply.began:
                    held.append(data)
                    if not call.first_token_s:
                        if not ended:
                            return
                        self._first_token(call, side)  # nothing was produced
                    data = b"".join(held)
            except CallError as problem:
                call.failed_on.add(instance.instance_id)
                response.fail(problem)
            else:
                if data or ended:
                    call.answered = ended
                    if reply.began:
                        reply.piece(data, ended)
                    else:
                        reply.begin(response, data, ended)

        def passed_chunk(framed: bytes, start: int) -> bool:
            nonlocal last_token_s
            if not relayed.passes(framed, start):
                return False
            last_token_s = side.produced(1)
            send_chunk(framed)
            return True

        try:
            await response.pipe(passed, passed_chunk if reply.is_chunked else None, status=200)
            if response.status != 200:
                await self._body(call, response, instance)
        except UpstreamError as problem:
            self._failed(call, instance, problem)
            raise
        finally:
            side.stream_ended(call, relayed.events)
            call.last_token_s = last_token_s
            response.close()
        if not relayed.done:
            raise CallError(502, "engine_error", "the engine's answer ended before its end")
        call.usage = relayed.usage or call.usage
        if relayed.usage is not None and relayed.usage.completion_tokens:
            call.output_tokens = relayed.usage.completion_tokens

    def _first_token(self, call: Call, side: DecodeSide) -> None:
        """The first token is here.

        Raises:
            CallError: it was made from KV that may have been gone.
        """
        now_s = time.monotonic()
        side.last_token_s = now_s
        if call.grant is not None and call.body.stream:
            if call.grant.expired(now_s):
                raise expired_error()
            call.grant = None
        call.first_token_s = now_s
        call.deadline_s = NO_TARGET_S
        side.enter(call)
        self._scheduler.prefill_ended(call)


def _as_error(problem: UpstreamError) -> CallError:
    if problem.kind == "timeout":
        return CallError(504, "engine_timeout", "the engine did not answer in time")
    if problem.kind == "connect":
        return CallError(503, "engine_unreachable", "the engine cannot be reached", 1, may_retry=True)
    return CallError(502, "engine_lost", "the engine's connection ended before its answer", may_retry=True)


def _refusal(status: int, body: bytes) -> CallError:
    """What an engine's answer other than 200 means to the client."""
    if status in (401, 403):
        return CallError(502, "engine_key", "the engine does not take the gateway's key")
    if status in (408, 429, 502, 503, 504):
        return CallError(503, "engine_busy", "the engine takes no more requests now", 1, may_retry=True)
    if 400 <= status < 500:
        return EngineRefusal(status, body)
    return CallError(502, "engine_error", "the engine failed", may_retry=True)
