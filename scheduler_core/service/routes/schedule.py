"""`POST /schedule`: the decisions for a snapshot. The body is read and written by msgspec, not by the framework."""

import time

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Request, Response

from kairos.scheduler_core.errors import TooLargeError
from kairos.scheduler_core.service.problems import decode_problem, problem_response
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Problem, Snapshot

_INLINE_BYTES = 64 * 1024
"""Bodies up to this are answered at once; larger ones in a thread, so that they do not hold up the others."""

_decoder = msgspec.json.Decoder(Snapshot)
_encoder = msgspec.json.Encoder()


def schedule_router(scheduler: Scheduler, max_body_bytes: int) -> APIRouter:
    """The route over one scheduler."""
    router = APIRouter()

    def answer(body: bytes) -> Response:
        try:
            snapshot = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return problem_response(decode_problem(body, error))
        decisions = scheduler.schedule(snapshot, time.time(), body)
        return Response(_encoder.encode(decisions), media_type="application/json")

    @router.post("/schedule")
    async def schedule(request: Request) -> Response:
        """Decide for a snapshot of a fleet: which request runs next, where, and in which batch.

        Nothing is kept: the same snapshot (and `state`) gives the same answer.
        """
        if unreadable := _unreadable(request):
            return problem_response(unreadable)
        body = await _body(request, max_body_bytes)
        return answer(body) if len(body) <= _INLINE_BYTES else await to_thread.run_sync(answer, body)

    return router


def _unreadable(request: Request) -> Problem | None:
    """Why the body cannot be read, going by the headers."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity")
    if kind != "application/json":
        return Problem("Unsupported Media Type", 415, f"content type is '{kind}'; send application/json")
    if coding != "identity":
        return Problem("Unsupported Media Type", 415, f"content encoding is '{coding}'; send the body as it is")
    return None


async def _body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        TooLargeError: it is longer than the limit, by its header or as it comes.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:18]) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the body is longer than {limit} bytes; send fewer requests, or raise service.max_body_bytes")
