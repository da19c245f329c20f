"""An HTTP/1.1 server on httptools for the data path: requests with their bodies in, bytes to the transport out.

One task a connection serves one request after the other, each when its body is here: a task for each would cost more
than most requests do. What clients owe is looked after by one sweep.
"""

import asyncio
import http
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any, Literal, NamedTuple, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools

from kairos.adapters.http_client import JOINED_BYTES, Headers

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_IDLE_S = 75.0
_PROGRESS_BYTES = 1024
_LOOK_S = 0.01
_STATUS = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}
_HEAD_BYTES = 65536
"""Most of a head; what comes in one read may be more."""

Work = Callable[[], Coroutine[Any, Any, None]]
BodyFault = Literal["too_large", "too_slow", "left"]


class Limits(NamedTuple):
    """What a client may take."""

    body_bytes: int
    body_s: float
    """For the whole body of a request."""
    idle_s: float
    """For its head, between two pieces of its body, and to read a kilobyte of the answer."""


class Application(Protocol):
    """What answers the requests of a server."""

    def begin(self, request: "Request") -> Work | None:
        """Say what will answer a request, whose head is here, when its body is too; None: it was answered."""

    def refuse(self, request: "Request", fault: BodyFault) -> None:
        """Answer a request whose body does not come as it should."""


class Flow(Protocol):
    """What an answer comes from, if that can wait for a client who reads slowly."""

    def pause(self) -> None:
        """Let nothing more come."""

    def resume(self) -> None:
        """Let it go on."""


class Request:
    """A request, and its answer: in one piece by `answer`, or by `begin`, `piece` and `end`."""

    __slots__ = (
        "_chunked",
        "_connection",
        "answered",
        "arrived_s",
        "began",
        "body",
        "fields",
        "flow",
        "headers",
        "keeps",
        "left",
        "method",
        "parts",
        "path",
        "size",
        "target",
        "task",
        "whole",
        "work",
    )

    def __init__(
        self, connection: "_Connection", method: bytes, target: bytes, headers: Headers, chunked: bool, keeps: bool
    ) -> None:
        self._connection = connection
        self._chunked = chunked
        self.keeps = keeps
        """Its connection goes on after the answer."""
        self.method = method
        self.target = target if target.startswith(b"/") else _path_of(target)
        """Path and query, as they came."""
        path = self.target.partition(b"?")[0]
        self.path = unquote_to_bytes(path) if b"%" in path else path
        self.headers = headers
        """With names in lower case."""
        self.fields = dict(headers)
        """The same by name: of several the last."""
        self.arrived_s = time.monotonic()
        self.parts: list[bytes] = []
        self.size = 0
        self.body = b""
        self.whole = False
        """Its body is here."""
        self.work: Work | None = None
        self.task: asyncio.Task[None] | None = None
        self.left: Callable[[], None] | None = None
        """What to do when its client leaves before its answer is out; None: stop its task."""
        self.began = False
        """The head of its answer is out."""
        self.answered = False
        self.flow: Flow | None = None

    @property
    def client(self) -> str:
        """The address that it comes from."""
        return self._connection.client

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Answer in one piece.

        Args:
            lines: headers (`header_lines`) without Content-Length, Date and Connection.
        """
        head = self._head(status, lines, b"content-length: %d\r\n" % len(body))
        if self.method == b"HEAD":
            body = b""
        self._connection.write(head, body)
        self._ended()

    def begin(self, status: int, lines: bytes, flow: Flow, data: bytes = b"", last: bool = False) -> None:
        """Begin an answer that comes in pieces, from `flow`, with the first of them; for the others see `answer`."""
        self._chunked = self._chunked and status not in (204, 304)
        head = self._head(status, lines, b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        self.flow = flow
        self._send(head + self._framed(data, last), last)
        if self._connection.is_full and not last:
            flow.pause()

    def piece(self, data: bytes, last: bool = False) -> None:
        """A piece of the answer; the last may be empty."""
        self._send(self._framed(data, last), last)

    def _framed(self, data: bytes, last: bool) -> bytes:
        if not self._chunked:
            return data
        if data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        return data + b"0\r\n\r\n" if last else data

    def _send(self, data: bytes, last: bool) -> None:
        self._connection.write(data)
        if last:
            self._ended()

    @property
    def is_chunked(self) -> bool:
        """Whether the pieces of its answer are chunks."""
        return self._chunked

    def chunk(self, framed: bytes) -> None:
        """A piece of an answer that is chunked, in its framing."""
        self._connection.write(framed)

    def break_off(self) -> None:
        """Let the client see that there should be more: its connection ends."""
        self.answered = True
        self._connection.abort()

    def _head(self, status: int, lines: bytes, framing: bytes) -> bytes:
        self.began = True
        line = _STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status
        close = b"" if self.keeps else b"connection: close\r\n"
        return b"%bdate: %b\r\n%b%b%b\r\n" % (line, self._connection.server.date(), lines, framing, close)

    def _ended(self) -> None:
        self.answered, self.flow = True, None
        self._connection.ended(self)


async def listen(
    connection: Callable[[], asyncio.Protocol], host: str, port: int, tls: ssl.SSLContext | None
) -> tuple[asyncio.Server, int]:
    """A listener that makes a connection of each that comes, and its port.

    Raises:
        OSError: the port cannot be had.
    """
    listener = await asyncio.get_running_loop().create_server(
        connection, host, port, ssl=tls, backlog=_BACKLOG, reuse_address=True, family=socket.AF_UNSPEC
    )
    taken: int = listener.sockets[0].getsockname()[1]
    return listener, taken


class HttpServer:
    """One application on one port.

    Args:
        port: 0 takes a free one.
        tls: for https.
    """

    def __init__(
        self,
        app: Application,
        limits: Limits,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.app = app
        self.limits = limits
        self.host, self.port = host, port
        self._tls = tls
        self._listener: asyncio.Server | None = None
        self.open: set[_Connection] = set()
        self.leaving: set[asyncio.Task[None]] = set()
        """Those of requests whose clients have left."""
        self._date_s = 0
        self._date = b""

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self.open)

    def date(self) -> bytes:
        """The value of the Date header now."""
        now_s = int(time.time())
        if now_s != self._date_s:
            self._date_s, self._date = now_s, formatdate(now_s, usegmt=True).encode()
        return self._date

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port cannot be had.
        """
        loop = asyncio.get_running_loop()
        self._listener, self.port = await listen(lambda: _Connection(self, loop), self.host, self.port, self._tls)

    def sweep(self, now_s: float) -> int:
        """End what clients keep waiting, by the limits; how many connections were cut. To be called again and again.

        Those are cut whose client does not send the head of a request, or does not take what waits for it.
        """
        return sum([connection.look(now_s, self.limits) for connection in list(self.open)])

    async def stop(self, grace_s: float = 0.0) -> int:
        """Take no new connections, let requests end for so long, then cut what is left; how many were cut."""
        if self._listener is None:
            return 0
        self._listener.close()
        self._listener = None
        for connection in list(self.open):
            connection.shut()
        left = await self._ends_within(grace_s)
        for connection in list(self.open):
            connection.abort()
        await self._ends_within(1.0)
        return left

    async def _ends_within(self, limit_s: float) -> int:
        """Wait for what is served to end; how much has not."""
        ends_s = time.monotonic() + limit_s
        while True:
            left = sum(connection.serves for connection in self.open) + len(self.leaving)
            if not left or time.monotonic() >= ends_s:
                return left
            await asyncio.sleep(_LOOK_S)


class _Connection(asyncio.Protocol):
    """One connection: one request after the other. Also the callbacks of httptools' parser."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.client = ""
        """The address at the other end."""
        self.is_full = False
        """More waits for its client than should."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = -1
        """Of the head that is on its way, in the reads before; -1: none is."""
        self._arriving: Request | None = None
        self._serving: Request | None = None
        self._ready: Request | None = None
        """The same, while it waits for the task."""
        self._task: asyncio.Task[None] | None = None
        self._called: asyncio.Future[None] | None = None
        """What the task waits for when there is nothing to serve."""
        self._next: deque[Request] = deque()
        """Requests that came before the one in front of them was answered."""
        self._shut = False
        """The request that is served is the last."""
        self._deaf = False
        """What comes is no HTTP any more."""
        self._idle = False
        """All was answered, and nothing has come since."""
        self._heard_s = 0.0
        self._owed: tuple[int, float] | None = None
        """Bytes that wait for the client, and since when no fewer do; 0: a request of it is waited for."""

    @property
    def serves(self) -> bool:
        """Whether there is a request that was not answered."""
        return bool(self._next) or (self._serving is not None and not self._serving.answered)

    # -- of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self.client = str(name[0]) if name else ""
        self.server.open.add(self)

    def data_received(self, data: bytes) -> None:
        self._idle = False
        self._heard_s = self._loop.time()
        if self._deaf:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing but HTTP/1.1 is spoken here
        except httptools.HttpParserCallbackError:
            _log.exception("a request could not be taken")
            self.abort()
        except httptools.HttpParserError:
            self._misunderstood(400, b"Invalid HTTP request received.")
        if self._head_bytes >= 0:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._misunderstood(431, b"The head of the request is too large.")

    def eof_received(self) -> None:
        return None

    def pause_writing(self) -> None:
        self.is_full = True
        if self._serving is not None and self._serving.flow is not None:
            self._serving.flow.pause()

    def resume_writing(self) -> None:
        self.is_full = False
        if self._serving is not None and self._serving.flow is not None:
            self._serving.flow.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.server.open.discard(self)
        self._next.clear()
        self._ready = None
        self._call()
        request = self._serving
        if request is None or request.answered:
            return
        if request.task is None:
            self.server.app.refuse(request, "left")
            return
        self.server.leaving.add(request.task)
        request.task.add_done_callback(self.server.leaving.discard)
        if request.left is None:
            request.task.cancel()
        else:
            request.left()

    # -- of the parser

    def on_message_begin(self) -> None:
        self._target, self._headers, self._head_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._head_bytes = -1
        parser = self._parser
        is_11 = parser.get_http_version() == "1.1"
        keeps = is_11 and parser.should_keep_alive()
        request = Request(self, parser.get_method(), self._target, self._headers, is_11, keeps)
        self._arriving = request
        if self._serving is None and not self._next:
            self._begin(request)
        else:
            self._next.append(request)
            if self._transport is not None:
                self._transport.pause_reading()

    def on_body(self, body: bytes) -> None:
        request = self._arriving
        if request is not None and not request.answered:
            request.parts.append(body)
            request.size += len(body)
            if request.size > self.server.limits.body_bytes and request is self._serving:
                self.server.app.refuse(request, "too_large")

    def on_message_complete(self) -> None:
        request, self._arriving = self._arriving, None
        if request is not None:
            request.whole = True
            if request is self._serving:
                self._serve(request)

    # -- the life of a request

    def _begin(self, request: Request) -> None:
        """Its turn has come; its body may be on its way."""
        self._serving = request
        if self._shut:
            request.keeps = False
        request.work = self.server.app.begin(request)
        if request.work is None:
            return
        declared = request.fields.get(b"content-length", b"0")
        if max(request.size, int(declared) if declared.isdigit() else 0) > self.server.limits.body_bytes:
            self.server.app.refuse(request, "too_large")
        elif not request.whole and request.fields.get(b"expect", b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve(self, request: Request) -> None:
        """All of it is here."""
        if request.answered:  # what came of its body since was dropped
            self._turn_over(request)
            return
        parts = request.parts
        request.body = parts[0] if len(parts) == 1 else b"".join(parts)
        request.parts = []
        self._ready = request
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        else:
            self._call()

    def _call(self) -> None:
        """Let the task look whether there is anything to do."""
        if self._called is not None and not self._called.done():
            self._called.set_result(None)

    async def _run(self) -> None:
        """Serve one request after the other; one that was cancelled is the last of this task."""
        task = self._task
        assert task is not None
        try:
            while not task.cancelling():
                while self._ready is None:
                    if self._transport is None:
                        return
                    self._called = self._loop.create_future()
                    await self._called
                request, self._ready = self._ready, None
                request.task = task
                await self._work(request)
                del request  # it may be large, and the next one far
        finally:
            self._task = self._called = None
            if self._ready is not None:
                self._task = self._loop.create_task(self._run())

    async def _work(self, request: Request) -> None:
        work, request.work = request.work, None
        assert work is not None
        try:
            await work()
        except Exception:
            _log.exception("a request failed in the application")
        finally:
            request.left = None
            if request.began and not request.answered:
                request.break_off()
            elif not request.answered:
                request.keeps = False
                request.answer(500, b"content-type: text/plain; charset=utf-8\r\n", b"Internal Server Error")

    def ended(self, request: Request) -> None:
        """It was answered."""
        if request.whole:
            self._turn_over(request)

    def _turn_over(self, request: Request) -> None:
        """The next may come."""
        self._serving = None
        if self._transport is None:
            return
        if self._shut or not request.keeps:
            self._transport.close()
            return
        self._idle, self._heard_s = True, self._loop.time()
        if self._next:
            self._loop.call_soon(self._take_next)

    def _take_next(self) -> None:
        if self._transport is None or not self._next:
            return
        request = self._next.popleft()
        if not self._next:
            self._transport.resume_reading()
        self._idle = False
        self._begin(request)
        if request.whole and not request.answered:
            self._serve(request)

    def _misunderstood(self, status: int, said: bytes) -> None:
        """What came cannot be taken: an answer that is on its way is the last, else this is one."""
        self._deaf, self._head_bytes = True, -1
        self._next.clear()
        if self.serves and self._arriving is None:
            self.shut()
        elif self._transport is not None:
            lines = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self._transport.write(_STATUS[status] + lines % len(said) + said)
            self._transport.close()

    # -- for its requests and the server

    def write(self, data: bytes, more: bytes = b"") -> None:
        """Send, unless nobody is there any more."""
        if self._transport is None:
            return
        if len(more) < JOINED_BYTES:
            self._transport.write(data + more)
        else:
            self._transport.writelines((data, more))

    def look(self, now_s: float, limits: Limits) -> bool:
        """Whether it was cut: for so long its client has not done what it must."""
        if self._transport is None:
            return False
        waiting, request = self._transport.get_write_buffer_size(), self._serving
        if not waiting and request is not None and not request.answered:
            self._owed = None
            late = now_s - self._heard_s > limits.idle_s or now_s - request.arrived_s > limits.body_s
            if late and not request.whole:
                self.server.app.refuse(request, "too_slow")
            return False
        if not waiting and self._idle:
            self._owed = None
            if now_s - self._heard_s > _KEEP_IDLE_S:
                self._transport.close()
            return False
        before, since_s = self._owed or (-1, now_s)
        if not before - _PROGRESS_BYTES < waiting <= before:
            self._owed = waiting, now_s
        elif now_s - since_s > limits.idle_s:
            self.abort()
            return True
        return False

    def shut(self) -> None:
        """Let the request that is served be the last."""
        self._shut = True
        if self._serving is not None and not self._serving.began:
            self._serving.keeps = False
        elif not self.serves and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


def _path_of(target: bytes) -> bytes:
    """Path and query of a target that is a whole URL, or none."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return target
    return (url.path or b"/") + (b"?" + url.query if url.query else b"")
