"""The few things that one says to an ASGI server."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from kairos.adapters.gateway.errors import CallError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Mapping[bytes, bytes]


async def read_body(receive: Receive, headers: Headers, limit_bytes: int, idle_s: float) -> bytes:
    """The body of a request.

    Raises:
        CallError: it is too large, comes too slowly, or its client left.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        return body
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            if message["type"] == "http.disconnect":
                raise CallError(499, "client_left", "the client left")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if not message.get("more_body"):
                return b"".join(parts)
            async with asyncio.timeout(idle_s):
                message = await receive()
    except TimeoutError:
        raise CallError(408, "body_too_slow", f"no piece of the body came for {idle_s:g} s") from None


async def answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """An answer in one piece."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _too_large(limit_bytes: int) -> CallError:
    return CallError(413, "body_too_large", f"the body is larger than {limit_bytes} bytes")
