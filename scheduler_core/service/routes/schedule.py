"""`POST /schedule`: the decisions for a snapshot. Plain ASGI and msgspec, since it is called for every decision."""

import time
from collections.abc import Callable

import msgspec
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kairos.scheduler_core.errors import TooLargeError
from kairos.scheduler_core.service.problems import decode_problem, problem_of, problem_response
from kairos.scheduler_core.service.schemas import Answer, Problem, Snapshot

_INLINE_BYTES = 64 * 1024
"""Bodies up to this are answered at once; larger ones in a thread, so that they do not hold up the others."""

_decoder = msgspec.json.Decoder(Snapshot)
_encoder = msgspec.json.Encoder()

Decide = Callable[[Snapshot, float, bytes], Answer]
"""`Scheduler.schedule`."""


def schedule_route(decide: Decide, max_body_bytes: int) -> Route:
    """The route over one scheduler; the OpenAPI document describes it in `openapi.py`."""
    return Route("/schedule", ScheduleEndpoint(decide, max_body_bytes), methods=["POST"])


class ScheduleEndpoint:
    """The ASGI application behind the route."""

    def __init__(self, decide: Decide, max_body_bytes: int) -> None:
        self._decide = decide
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the snapshot, decide, answer."""
        headers = Headers(scope=scope)
        if unreadable := _unreadable(headers):
            response = problem_response(unreadable)
        else:
            body = await self._body(headers, receive)
            if body is None:
                return
            if len(body) <= _INLINE_BYTES:
                response = self._answer(body)
            else:
                response = await to_thread.run_sync(self._answer, body)
        await response(scope, receive, send)

    def _answer(self, body: bytes) -> Response:
        try:
            snapshot = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return problem_response(decode_problem(body, error))
        return Response(_encoder.encode(self._decide(snapshot, time.time(), body)), media_type="application/json")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client left.

        Raises:
            TooLargeError: it is longer than the limit, by its header or as it comes.
        """
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > self._max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the body is longer than {self._max_body_bytes} bytes; send less, or raise service.max_body_bytes"
        )


def _unreadable(headers: Headers) -> Problem | None:
    """Why the body cannot be read, going by the headers."""
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        return problem_of(415, f"content type is '{kind}'; send application/json")
    if (coding := headers.get("content-encoding", "identity")) != "identity":
        return problem_of(415, f"content encoding is '{coding}'; send the body as it is")
    return None
