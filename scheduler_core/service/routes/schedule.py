"""`POST /schedule`: the decisions for a snapshot. Plain ASGI and msgspec, since it is called for every decision."""

import time
from collections.abc import Callable

import msgspec
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kairos.scheduler_core.service.bodies import UNDECODABLE, read_body, unreadable
from kairos.scheduler_core.service.problems import decode_problem, problem_response
from kairos.scheduler_core.service.schemas import Answer, Snapshot

_INLINE_BYTES = 64 * 1024
"""Bodies up to this are answered at once; larger ones in a thread, so that they do not hold up the others."""

_decoder = msgspec.json.Decoder(Snapshot)
_encoder = msgspec.json.Encoder()

Decide = Callable[[Snapshot, float, bytes], Answer]
"""`Scheduler.schedule`."""


def schedule_route(decide: Decide) -> Route:
    """The route over one scheduler; the OpenAPI document describes it in `openapi.py`."""
    return Route("/schedule", ScheduleEndpoint(decide), methods=["POST"])


class ScheduleEndpoint:
    """The ASGI application behind the route."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the snapshot, decide, answer."""
        headers = Headers(scope=scope)
        if refusal := unreadable(headers, ("application/json",), ("identity",)):
            response = problem_response(refusal)
        else:
            body = await read_body(receive)
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
        except UNDECODABLE as error:
            return problem_response(decode_problem(body, error))
        return Response(_encoder.encode(self._decide(snapshot, time.time(), body)), media_type="application/json")
