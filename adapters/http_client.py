"""A small HTTP/1.1 client on httptools: pooled keep-alive connections to one address, bytes in, bytes out.

For the data path: no task, queue or timer a request. Deadlines are looked after by one sweep of the pool.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Literal, cast
from urllib.parse import urlsplit

import httptools

Headers = list[tuple[bytes, bytes]]

_SWEEP_S = 0.1
_BUFFER_BYTES = 256 * 1024
"""Unread body beyond which reading pauses."""
_KEEP_IDLE_S = 3.0
"""Below the five seconds after which uvicorn, and so vLLM and SGLang, close an idle connection."""


FailureKind = Literal["connect", "lost", "timeout", "protocol"]


class UpstreamError(Exception):
    """A request got no whole answer.

    `connect`: no connection was made, nothing was sent. `lost`: the connection ended. `timeout`: nothing came in time.
    `protocol`: what came is no HTTP.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Response:
    """An answer whose head is here; its body comes by `chunk`. Close it unless it was read to its end."""

    __slots__ = ("_connection", "headers", "status")

    def __init__(self, connection: "_Connection") -> None:
        self.status: int = connection.status
        self.headers: Headers = connection.headers
        self._connection: _Connection | None = connection

    def header(self, name: bytes) -> bytes:
        """The value of a header, by its lower-case name; empty without one."""
        return next((value for key, value in self.headers if key == name), b"")

    async def chunk(self) -> bytes:
        """What has come since; empty at the end of the body.

        Raises:
            UpstreamError: the body will not come whole.
        """
        connection = self._connection
        if connection is None:
            return b""
        data = await connection.read()
        if not data:
            self._connection = None
        return data

    async def body(self, limit_bytes: int = 64 * 2**20) -> bytes:
        """The whole (rest of the) body; raises UpstreamError as `chunk`, or when it is longer than the limit."""
        parts: list[bytes] = []
        size = 0
        while data := await self.chunk():
            parts.append(data)
            size += len(data)
            if size > limit_bytes:
                self.close()
                raise UpstreamError("protocol", f"answer longer than {limit_bytes} bytes")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give the answer up; the server sees the connection end."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


class HttpPool:
    """Connections to one address, opened as needed and kept while idle.

    Args:
        url: `http://host:port` or `https://...`.
        connect_s: seconds a connection may take.
        tls: for https; None: the system's certificates.
    """

    def __init__(self, url: str, connect_s: float = 2.0, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        if parts.hostname is None:
            raise ValueError(f"{url} is no address; write http://host:port")
        secure = parts.scheme == "https"
        self.url = url.rstrip("/")
        self.host = parts.hostname
        self.port = parts.port or (443 if secure else 80)
        self._prefix = parts.path.rstrip("/").encode()
        self._authority = parts.netloc.rpartition("@")[2].encode()
        self._connect_s = connect_s
        self._tls = (tls or ssl.create_default_context()) if secure else None
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Open ones, idle or not."""
        return len(self._open)

    @property
    def busy(self) -> int:
        """Those that carry a request."""
        return len(self._open) - len(self._idle)

    async def send(
        self,
        method: bytes,
        path: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        *,
        first_byte_s: float = 30.0,
        idle_s: float = 30.0,
    ) -> Response:
        """Send a request and wait for the head of its answer.

        Args:
            headers: without Host, Content-Length and Connection.
            first_byte_s: seconds until the answer must begin.
            idle_s: seconds that may pass between two pieces of it.

        Raises:
            UpstreamError: there will be no answer.
        """
        connection = self._reuse() or await self._connect()
        head = [method, b" ", self._prefix, path, b" HTTP/1.1\r\nhost: ", self._authority, b"\r\n"]
        for name, value in headers:
            head += (name, b": ", value, b"\r\n")
        if body or method != b"GET":
            head.append(b"content-length: %d\r\n" % len(body))
        head.append(b"\r\n")
        self._sweep_later()
        try:
            await connection.exchange(b"".join(head), body, first_byte_s, idle_s)
        except BaseException:
            connection.abort()
            raise
        return Response(connection)

    def close(self) -> None:
        """Close every connection, those in use too."""
        for connection in list(self._open):
            connection.abort()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    # -- for its connections

    def _reuse(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            connection.abort()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = _Connection(self, loop)
        try:
            async with asyncio.timeout(self._connect_s):
                await loop.create_connection(lambda: connection, self.host, self.port, ssl=self._tls)
        except TimeoutError:
            connection.abort()
            raise UpstreamError("connect", f"{self.url}: no connection within {self._connect_s:g} s") from None
        except OSError as problem:
            raise UpstreamError("connect", f"{self.url}: {problem.strerror or problem}") from None
        except BaseException:  # cancelled while it was being made
            connection.abort()
            raise
        return connection

    def opened(self, connection: "_Connection") -> None:
        """Count a connection."""
        self._open.add(connection)

    def lost(self, connection: "_Connection") -> None:
        """Forget a connection."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def release(self, connection: "_Connection") -> None:
        """Keep a connection whose answer is complete."""
        self._idle.append(connection)

    def _sweep_later(self) -> None:
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        now_s = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check_deadline(now_s)
        while self._idle and now_s - self._idle[0].idle_since_s > _KEEP_IDLE_S:
            self._idle.popleft().abort()
        if self._open:
            self._sweep_later()


class _Connection(asyncio.Protocol):
    """One connection: one request after the other. Also the callbacks of httptools' parser."""

    def __init__(self, pool: HttpPool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self.idle_since_s = 0.0
        self._busy = False
        self._given_up = False
        self._parser = httptools.HttpResponseParser(self)
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._complete = False
        self._keep = False
        self._framed = False
        self._error: UpstreamError | None = None
        self._deadline_s = float("inf")
        self._idle_limit_s = 0.0

    # -- of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._given_up:
            self._transport.abort()
        else:
            self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if not self._busy:  # nothing was asked
            self.abort()
            return
        self._deadline_s = self._loop.time() + self._idle_limit_s
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            self._fail(UpstreamError("protocol", f"{self._pool.url}: {problem}"))

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)
        if not self._busy or self._complete:
            return
        if self.status and not self._framed:  # such a body ends with its connection
            self.on_message_complete()
        else:
            self._fail(UpstreamError("lost", f"{self._pool.url}: the connection ended"))

    # -- of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self._framed = self._framed or status in (204, 304)
        self.status = status
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _BUFFER_BYTES and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True
        self._wake()

    def on_message_complete(self) -> None:
        if not self.status:
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive()
        self._deadline_s = float("inf")
        self._wake()

    # -- for the pool and the response

    def usable(self) -> bool:
        """Whether it may carry another request."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._loop.time() - self.idle_since_s < _KEEP_IDLE_S
        )

    async def exchange(self, head: bytes, body: bytes, first_byte_s: float, idle_s: float) -> None:
        """Send a request and wait for the head of its answer."""
        self._begin()
        self._busy = True
        self._idle_limit_s = idle_s
        self._deadline_s = self._loop.time() + first_byte_s
        if self._transport is None:
            raise UpstreamError("lost", f"{self._pool.url}: the connection ended")
        self._transport.writelines((head, body) if body else (head,))
        while not self.status:
            await self._more()

    async def read(self) -> bytes:
        """What has come; empty at the end, and the connection is another request's then."""
        while not self._chunks:
            if self._complete:
                self._finish()
                return b""
            await self._more()
        chunks = self._chunks
        self._chunks = []
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
            self._paused = False
            self._deadline_s = self._loop.time() + self._idle_limit_s
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def check_deadline(self, now_s: float) -> None:
        """Fail when nothing came in time; an answer that its reader holds up is not late."""
        if self._busy and now_s > self._deadline_s and not self._chunks:
            self._fail(UpstreamError("timeout", f"{self._pool.url}: nothing came in time"))

    def abort(self) -> None:
        """Close at once, also if it is not open yet."""
        self._given_up = True
        self._pool.lost(self)  # uvloop does not always tell
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        self.abort()
        self._wake()

    def _finish(self) -> None:
        self._busy = False
        if self._keep and self._transport is not None and not self._transport.is_closing():
            self.idle_since_s = self._loop.time()
            self._pool.release(self)
        else:
            self.abort()
