"""A small HTTP/1.1 client on httptools: pooled keep-alive connections to one address, bytes in, bytes out.

For the data path: no task, queue or timer a request. Deadlines are looked after by one sweep of the pool.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, cast
from urllib.parse import urlsplit

import httptools

Headers = list[tuple[bytes, bytes]]

_SWEEP_S = 0.1
_BUFFER_BYTES = 256 * 1024
"""Unread body beyond which reading pauses."""
_WHOLE_BYTES = 64 * 2**20
"""A longer answer is none."""
JOINED_BYTES = 16 * 1024
"""Bodies below are copied behind their head."""
_LONGEST_CHUNK_BYTES = 4096
"""Longer ones are not passed on in their framing."""
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


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as they are sent.

    >>> header_lines([(b"a", b"1"), (b"b", b"2")])
    b'a: 1\\r\\nb: 2\\r\\n'
    """
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def _size_lines(longest: int) -> list[bytes]:
    """The first line of a chunk, by the bytes of line, content and end together; where none has so many, no line.

    >>> _size_lines(21)[5:7], _size_lines(21)[20:]
    ([b'\\n', b'1\\r\\n'], [b'f\\r\\n', b'\\n'])
    """
    lines = [b"\n"] * (longest + 1)
    for content in range(1, longest):
        line = b"%x\r\n" % content
        if (whole := len(line) + content + 2) <= longest:
            lines[whole] = line
    return lines


_SIZE_LINES = _size_lines(_LONGEST_CHUNK_BYTES)


class Response:
    """The answer to one request, as it comes. Close it unless it was read to its end.

    It is read by `chunk`, `body` or `pipe`. They and `head` raise UpstreamError when it will not come whole.
    """

    __slots__ = (
        "_connection",
        "_due_s",
        "_ended",
        "_idle_s",
        "_limit_bytes",
        "_sink",
        "_to_its_end",
        "_waiter",
        "_wanted_status",
        "buffered",
        "chunks",
        "complete",
        "framed",
        "headers",
        "heard",
        "parts",
        "problem",
        "status",
    )

    def __init__(self, connection: "_Connection", due_s: float, idle_s: float) -> None:
        self.status = 0
        """0 until its head is here."""
        self.headers: Headers = []
        self.framed = False
        """It says itself where it ends."""
        self.complete = False
        self.problem: Exception | None = None
        """Why it will not come whole."""
        self._due_s = due_s
        self.heard = False
        """More came since `_due_s` was set."""
        self._idle_s = idle_s
        self._connection: _Connection | None = connection
        self.parts: list[bytes] = []
        """Of its body: those that nobody has taken yet."""
        self.buffered = 0
        """Bytes of them."""
        self._limit_bytes = _BUFFER_BYTES
        self._to_its_end = False
        self._sink: Callable[[bytes, bool], None] | None = None
        self.chunks: Callable[[bytes, int], bool] | None = None
        """Takes chunks as they are framed."""
        self._wanted_status: int | None = None
        self._ended: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- to read it

    def header(self, name: bytes) -> bytes:
        """The value of a header, by its lower-case name; empty without one."""
        return next((value for key, value in self.headers if key == name), b"")

    async def head(self) -> None:
        """Wait until status and headers are here."""
        while not self.status:
            await self._more()

    async def chunk(self) -> bytes:
        """What has come since; empty at the end of the body."""
        while not self.parts:
            if self.complete:
                return b""
            await self._more()
        self.resume()
        return self.taken()

    async def body(self, limit_bytes: int = _WHOLE_BYTES) -> bytes:
        """The whole (rest of the) body; raises UpstreamError also when it is longer than the limit."""
        self._limit_bytes, self._to_its_end = limit_bytes, True
        self.resume()
        while not self.complete:
            await self._more()
        return self.taken()

    async def pipe(
        self,
        sink: Callable[[bytes, bool], None],
        chunks: Callable[[bytes, int], bool] | None = None,
        status: int | None = None,
    ) -> None:
        """Give the body to `sink`, each piece as soon as it is here and without a task in between.

        Args:
            sink: told a piece and whether it is the last, which may be empty. It does not raise: it may `fail` this.
            chunks: told a chunk that comes by itself, framed as it came, and where its content starts; `sink` gets
                those that it does not take (False).
            status: the answer must have it; another is left to `body`. None: any will do.
        """
        self._sink, self.chunks, self._to_its_end = sink, chunks, True
        self._wanted_status = status
        self.resume()
        self.came()
        while self._sink is sink:
            await self._more()
        if self.problem is not None:
            raise self.problem

    def when_ended(self, ended: Callable[[], None]) -> None:
        """Call `ended` as soon as all of it is here, or it has failed. `taken` is whole where its status is not 200."""
        self._ended, self._limit_bytes, self._to_its_end = ended, _WHOLE_BYTES, True
        self.chunks = lambda framed, start: self.status == 200
        if self.complete or self.problem is not None:
            ended()

    def taken(self) -> bytes:
        """What has come since, without a wait."""
        parts, self.parts, self.buffered = self.parts, [], 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pause(self) -> None:
        """Let nothing more come for now; that is not late then."""
        if self._connection is not None and self._connection.holds(True):
            self.heard, self._due_s = False, float("inf")

    def resume(self) -> None:
        """Let it go on."""
        if self._connection is not None and self._connection.holds(False):
            self._due_s = self._connection.loop.time() + self._idle_s

    def fail(self, problem: Exception) -> None:
        """End it: who waits for it gets this."""
        if self.problem is None:
            self.problem = problem
            self.close()
            self._wake()

    def close(self) -> None:
        """Give it up; the server sees the connection end."""
        connection, self._connection, self._sink, self.chunks = self._connection, None, None, None
        if connection is not None:
            connection.response = None
            connection.abort()

    # -- for its connection

    def is_late(self, now_s: float) -> bool:
        """Whether nothing came in time; an answer that its reader holds up is not late."""
        if self.heard:
            self.heard, self._due_s = False, now_s + self._idle_s
        return now_s > self._due_s and (self._to_its_end or not self.parts)

    def came(self) -> None:
        """All that there was to read is here."""
        if self.complete:
            self._connection = None
        elif self.parts:  # a head alone says nothing of when its body begins
            self.heard = True
        if self._sink is not None and self.status:
            if self._wanted_status not in (None, self.status):
                self._sink = self.chunks = None
                self._to_its_end = False
            else:
                if self.parts or self.complete:
                    self._sink(self.taken(), self.complete)
                if not self.complete:
                    return
                self._sink = None
        if self.buffered > self._limit_bytes and not self.complete:
            if self._to_its_end:
                self.fail(UpstreamError("protocol", f"answer longer than {self._limit_bytes} bytes"))
            else:
                self.pause()
        if self.complete or not self._to_its_end or not self.status:
            self._wake()

    def _more(self) -> asyncio.Future[None]:
        """What to wait for: something has come, or nothing will.

        Raises:
            UpstreamError: nothing will.
        """
        if self.problem is not None:
            raise self.problem
        assert self._connection is not None, "it was closed"
        self._waiter = self._connection.loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._ended is not None and (self.complete or self.problem is not None):
            ended, self._ended = self._ended, None
            ended()


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
        """Send a request and wait for the head of its answer; arguments and errors are those of `start`."""
        lines = header_lines(headers)
        response = await self.start(method, path, lines, body, first_byte_s=first_byte_s, idle_s=idle_s)
        try:
            await response.head()
        except BaseException:
            response.close()
            raise
        return response

    async def start(
        self,
        method: bytes,
        path: bytes,
        lines: bytes = b"",
        body: bytes = b"",
        *,
        first_byte_s: float = 30.0,
        idle_s: float = 30.0,
    ) -> Response:
        """Send a request; there is nothing to wait for where an idle connection is kept.

        Args:
            lines: its headers (`header_lines`), without Host, Content-Length and Connection.
            first_byte_s: seconds until the body of the answer must begin.
            idle_s: seconds that may pass between two pieces of it.

        Raises:
            UpstreamError: there will be no answer.
        """
        connection = self._reuse() or await self._connect()
        length = b"content-length: %d\r\n" % len(body) if body or method != b"GET" else b""
        head = b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n" % (
            *(method, self._prefix, path, self._authority, lines, length),
        )
        if self._sweeping is None:
            self._sweep_later()
        return connection.ask(head, body, first_byte_s, idle_s)

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
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        now_s = asyncio.get_running_loop().time()
        for connection in list(self._open):
            if connection.response is not None and connection.response.is_late(now_s):
                connection.response.fail(UpstreamError("timeout", f"{self.url}: nothing came in time"))
        while self._idle and now_s - self._idle[0].idle_since_s > _KEEP_IDLE_S:
            self._idle.popleft().abort()
        if self._open:
            self._sweep_later()


class _Connection(asyncio.Protocol):
    """One connection: one request after the other. Also the callbacks of httptools' parser."""

    def __init__(self, pool: HttpPool, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.response: Response | None = None
        """That which comes; None: nothing was asked, or all of it is here."""
        self.idle_since_s = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._held = False
        self._keeps = False
        self._given_up = False
        self._chunks: Callable[[bytes, int], bool] | None = None
        """Takes the next chunk if it likes; None: nobody does, or something of that was fed to the parser."""
        self._parser = httptools.HttpResponseParser(self)

    # -- of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._given_up:
            self._transport.abort()
        else:
            self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response is None:  # nothing was asked
            self.abort()
            return
        chunks = self._chunks
        if chunks is not None and len(data) <= _LONGEST_CHUNK_BYTES:
            line = _SIZE_LINES[len(data)]
            if data.startswith(line) and data.endswith(b"\r\n"):
                response.heard = True
                if chunks(data, len(line)):
                    return
        try:
            self._parser.feed_data(data)
            if not data.endswith(b"\r\n"):  # a part of a chunk's first line
                self._chunks = None
        except httptools.HttpParserError as problem:
            self._keeps = False
            if not response.complete:
                response.fail(UpstreamError("protocol", f"{self._pool.url}: {problem}"))
        if response.complete:
            self._release()
        response.came()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)
        response = self.response
        if response is None:
            return
        if response.status and not response.framed:  # such a body ends with its connection
            self.on_message_complete()
            response.came()
        else:
            response.fail(UpstreamError("lost", f"{self._pool.url}: the connection ended"))

    # -- of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.response is not None:
            name = name.lower()
            if name in (b"content-length", b"transfer-encoding"):
                self.response.framed = True
            self.response.headers.append((name, value))

    def on_headers_complete(self) -> None:
        response = self.response
        if response is None:  # a second answer to one request
            self._keeps = False
            return
        status: int = self._parser.get_status_code()
        if status < 200:
            response.headers = []
            return
        response.framed = response.framed or status in (204, 304)
        response.status = status

    def on_body(self, body: bytes) -> None:
        response = self.response
        if response is not None:
            response.parts.append(body)
            response.buffered += len(body)

    def on_chunk_header(self) -> None:
        self._chunks = None

    def on_chunk_complete(self) -> None:
        if self.response is not None:
            self._chunks = self.response.chunks

    def on_message_complete(self) -> None:
        self._chunks = None
        if self.response is not None and self.response.status:
            self.response.complete = True
            self.response = None
            self._keeps = self._parser.should_keep_alive()

    # -- for the pool and the response

    def usable(self) -> bool:
        """Whether it may carry another request."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self.loop.time() - self.idle_since_s < _KEEP_IDLE_S
        )

    def ask(self, head: bytes, body: bytes, first_byte_s: float, idle_s: float) -> Response:
        """Send a request."""
        if self._transport is None:
            raise UpstreamError("lost", f"{self._pool.url}: the connection ended")
        self.response = response = Response(self, self.loop.time() + first_byte_s, idle_s)
        if len(body) < JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        return response

    def holds(self, hold: bool) -> bool:
        """Whether that stops its reading, or lets it go on."""
        if hold is self._held or self._transport is None:
            return False
        self._held = hold
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        return True

    def abort(self) -> None:
        """Close at once, also if it is not open yet."""
        self._given_up = True
        self._pool.lost(self)  # uvloop does not always tell
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> None:
        if self._keeps and self._transport is not None and not self._transport.is_closing():
            self.holds(False)
            self.idle_since_s = self.loop.time()
            self._pool.release(self)
        else:
            self.abort()
