"""Bodies of requests: the limits of every route, and how the routes that are plain ASGI read them."""

import asyncio
import gzip
import io
import zlib
from collections.abc import Sequence

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kairos.scheduler_core.errors import InputError, TooLargeError
from kairos.scheduler_core.service.problems import problem_of, problem_response
from kairos.scheduler_core.service.schemas import Problem

UNDECODABLE = (msgspec.DecodeError, UnicodeError, RecursionError)
"""What a decoder of msgspec raises at a body that it cannot take."""


def media_type(headers: Headers) -> str:
    """What the body is said to be; JSON where nothing is said."""
    return headers.get("content-type", "application/json").partition(";")[0].strip().lower()


def content_coding(headers: Headers) -> str:
    """How the body is said to be compressed."""
    return headers.get("content-encoding", "identity").strip().lower()


def unreadable(headers: Headers, kinds: Sequence[str], codings: Sequence[str]) -> Problem | None:
    """Why the body cannot be read, going by the headers."""
    if (kind := media_type(headers)) not in kinds:
        return problem_of(415, f"content type is '{kind}'; send {' or '.join(kinds)}")
    if (coding := content_coding(headers)) not in codings:
        return problem_of(415, f"content encoding is '{coding}'; send {' or '.join(codings)}")
    return None


async def read_body(receive: Receive) -> bytes | None:
    """The whole body, which `Limits` keeps short; None when the client left."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def unzipped(body: bytes, most_bytes: int) -> bytes:
    """What gzip made smaller.

    Raises:
        TooLargeError: it is longer than the limit.
        InputError: it is not gzip, or not all of it.
    """
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(most_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the body is not gzip: {' '.join(str(error).split())}; send all of it") from None
    if len(content) > most_bytes:
        raise _too_large(most_bytes)
    return content


def _too_large(most_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body is longer than {most_bytes} bytes; send less, or raise service.max_body_bytes")


class Limits:
    """The ASGI middleware that keeps every body below a length and a time."""

    def __init__(self, app: ASGIApp, most_bytes: int, most_s: float) -> None:
        self._app, self._most_bytes, self._most_s = app, most_bytes, most_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on with a body that ends in 413 or 408 where it goes over a limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:18]) > self._most_bytes:
            problem = problem_of(413, str(_too_large(self._most_bytes)))
            await problem_response(problem, _CLOSE)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        due_s = asyncio.get_running_loop().time() + self._most_s
        size, whole = 0, False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(due_s):
                    message = await receive()
            except TimeoutError:
                slow = f"the body did not come within {self._most_s:g} s (service.client_timeout_s); send it again"
                raise HTTPException(408, slow, _CLOSE) from None
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise HTTPException(413, str(_too_large(self._most_bytes)), _CLOSE)
            whole = not message.get("more_body", False)
            return message

        return limited


_CLOSE = {"connection": "close"}
"""What is left of such a body is not read."""
