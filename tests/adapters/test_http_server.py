"""What an HTTP/1.1 server owes its clients, byte by byte; the gateway's own tests look at the rest."""

import asyncio
from functools import partial
from typing import Any

import pytest
from emulated import run, until

from kairos.adapters.http_server import BodyFault, HttpServer, Limits, Request, Work

LIMITS = Limits(body_bytes=100, body_s=1000.0, idle_s=1000.0)


class Echo:
    """Answers with the body, slowly at /slow, in pieces at /pieces; knows no /none and fails at /bug.

    At /interrupted it answers although it was told to stop.
    """

    def __init__(self) -> None:
        self.faults: list[BodyFault] = []
        self.stopped = 0

    def begin(self, request: Request) -> Work | None:
        if request.path == b"/none":
            request.answer(404, b"", b"none")
            return None
        return partial(self._serve, request)

    def refuse(self, request: Request, fault: BodyFault) -> None:
        self.faults.append(fault)
        request.answer(413 if fault == "too_large" else 408, b"", fault.encode())

    async def _serve(self, request: Request) -> None:
        if request.path == b"/bug":
            raise ValueError("a bug")
        if request.path == b"/interrupted":
            assert request.task is not None
            request.task.cancel()
        if request.path == b"/slow":
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.stopped += 1
                raise
        if request.path == b"/pieces":
            request.begin(200, b"", self)
            for piece in (b"one", b"two"):
                request.piece(piece)
            request.piece(b"", last=True)
        else:
            request.answer(200, b"", request.body)

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def post(path: str, body: bytes = b"", *more: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: h", f"content-length: {len(body)}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


async def told(sent: bytes, app: Echo, ends: bytes | None = None, limits: Limits = LIMITS, then: bytes = b"") -> bytes:
    """What comes back, without dates: until it ends with `ends`, then what comes after `then` was sent too."""
    server = HttpServer(app, limits)
    await server.start()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(sent)
    got = b""
    while ends is None or not got.endswith(ends):
        data = await reader.read(2**16)
        if not data:
            break
        got += data
        if then and got.endswith(b"\r\n\r\n"):
            writer.write(then)
            then = b""
    writer.close()
    await server.stop()
    lines = [line for line in got.split(b"\r\n") if not line.startswith(b"date: ")]
    return b"\r\n".join(lines)


def ok(body: bytes, *more: bytes) -> bytes:
    return b"\r\n".join((b"HTTP/1.1 200 OK", b"content-length: %d" % len(body), *more, b"", body))


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (post("/", b"hello"), ok(b"hello")),
        (post("/?a=b", b"hello") + post("/slow", b"again"), ok(b"hello") + ok(b"again")),
        (post("/slow", b"1") + post("/", b"2") + post("/slow", b"3"), ok(b"1") + ok(b"2") + ok(b"3")),
        (
            post("/interrupted", b"1") + post("/slow", b"2") + post("/", b"3"),
            ok(b"1") + ok(b"2") + ok(b"3"),
        ),
        (post("/none", b"1") + post("/", b"2"), b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnone" + ok(b"2")),
        (post("http://h/", b"hello"), ok(b"hello")),
        (
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
            ok(b"hello"),
        ),
        (b"HEAD / HTTP/1.1\r\nhost: h\r\n\r\n" + post("/", b"x"), ok(b"") + ok(b"x")),
        (
            post("/pieces"),
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n",
        ),
    ],
)
def test_requests_on_one_connection_are_answered_in_their_order(sent: bytes, answer: bytes) -> None:
    assert run(told(sent, Echo(), ends=answer[-8:])) == answer


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (post("/", b"x", "connection: close"), ok(b"x", b"connection: close")),
        (post("/", b"x", version="1.0"), ok(b"x", b"connection: close")),
        (post("/pieces", version="1.0"), b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nonetwo"),
    ],
)
def test_a_connection_ends_where_the_client_wants_it_to_or_speaks_http_1_0(sent: bytes, answer: bytes) -> None:
    assert run(told(sent, Echo())) == answer


def test_what_is_no_http_is_answered_400_and_ends_the_connection() -> None:
    assert run(told(b"hello\r\n\r\n", Echo())).startswith(b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("many", [b"a: %b\r\n" % (b"b" * 1000), b"b" * 1000], ids=["headers", "header"])
def test_a_head_without_end_is_answered_431_and_ends_the_connection(many: bytes) -> None:
    assert run(told(b"GET / HTTP/1.1\r\nc: d" + 70 * many, Echo())).startswith(b"HTTP/1.1 431 ")


def test_no_http_behind_a_request_does_not_keep_it_from_its_answer() -> None:
    assert run(told(post("/slow", b"x") + b"hello\r\n\r\n", Echo())) == ok(b"x", b"connection: close")


def test_a_client_that_asks_before_it_sends_its_body_is_told_to() -> None:
    sent = post("/", b"", "expect: 100-continue").replace(b"content-length: 0", b"content-length: 5")

    assert run(told(sent, Echo(), ends=b"hello", then=b"hello")) == b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"hello")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_once_and_the_next_request_served(chunked: bool) -> None:
    app = Echo()
    sent = post("/", b"x" * 300)
    if chunked:
        sent = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
        sent += b"64\r\n" + b"x" * 100 + b"\r\n64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n"

    got = run(told(sent + post("/", b"next"), app, ends=b"next"))

    assert got.startswith(b"HTTP/1.1 413 ")
    assert got.endswith(b"\r\ncontent-length: 9\r\n\r\ntoo_large" + ok(b"next"))
    assert app.faults == ["too_large"]


def test_a_bug_is_answered_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert run(told(post("/bug"), Echo())).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert [record.getMessage() for record in caplog.records] == ["a request failed in the application"]


@pytest.mark.parametrize("sent", [post("/slow", b"x"), post("/", b"x").replace(b"length: 1", b"length: 2")])
def test_a_client_that_leaves_stops_what_is_done_for_it(sent: bytes) -> None:
    async def work() -> tuple[list[BodyFault], int]:
        app = Echo()
        server = HttpServer(app, LIMITS)
        await server.start()
        _, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(sent)
        await until(lambda: any(connection.serves for connection in server.open))
        writer.transport.abort()
        await until(lambda: bool(app.faults or app.stopped))
        await server.stop()
        return app.faults, app.stopped

    assert run(work()) in (([], 1), (["left"], 0))


def test_a_server_that_ends_lets_a_request_end_and_takes_no_more() -> None:
    async def work() -> tuple[bytes, int, Any]:
        server = HttpServer(Echo(), LIMITS)
        await server.start()
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(post("/slow", b"x"))
        await until(lambda: any(connection.serves for connection in server.open))
        left = await server.stop(grace_s=5.0)
        got = await reader.read()
        writer.close()
        try:
            await asyncio.open_connection(server.host, server.port)
        except OSError as problem:
            return got, left, type(problem)
        return got, left, None

    got, left, refused = run(work())

    assert got.endswith(b"connection: close\r\n\r\nx")
    assert (left, refused) == (0, ConnectionRefusedError)
