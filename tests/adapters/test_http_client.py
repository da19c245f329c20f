"""What an answer from upstream may take, and how it is given on; the gateway's own tests look at the rest."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from emulated import run
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.adapters.http_client import HttpPool, UpstreamError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def engine(pieces: Sequence[bytes], apart_s: float) -> AsyncIterator[HttpPool]:
    """Answers every request with these pieces."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                for n, piece in enumerate(pieces):
                    await asyncio.sleep(apart_s * bool(n))
                    writer.write(piece)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pool = HttpPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield pool
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


async def asked(*pieces: bytes, first_byte_s: float = 60.0) -> bytes:
    """What comes of pieces that are half a second apart where 0.1 s may pass between two of the body."""
    async with engine(pieces, 0.5) as pool:
        response = await pool.send(b"GET", b"/", (), first_byte_s=first_byte_s, idle_s=0.1)
        return await response.body()


def test_an_engine_that_says_200_may_take_its_time_until_the_first_token() -> None:
    assert run(asked(HEAD, b"ok")) == b"ok"


@pytest.mark.parametrize("first_byte_s", [60.0, 0.1])
def test_what_stops_in_the_middle_or_does_not_begin_is_given_up(first_byte_s: float) -> None:
    pieces = (HEAD + b"o", b"k") if first_byte_s > 1 else (HEAD, b"ok")

    with pytest.raises(UpstreamError) as found:
        run(asked(*pieces, first_byte_s=first_byte_s))

    assert found.value.kind == "timeout"


# -- given on piece by piece


def framed(text: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text)


TEXTS = [b"a", framed(b"hello"), b"x" * 20, b"0\r\n\r\n", b"y" * 5000]
FRAMES = {framed(text): text for text in TEXTS} | {b"0B\r\nupper case!\r\n": b"upper case!", b"2;a=1\r\nok\r\n": b"ok"}
"""Chunks, and what is in them."""


async def piped(reads: Sequence[bytes], takes: bool) -> tuple[bytes, list[bytes]]:
    """The bodies of two answers on one connection that come in these reads, and the chunks that were given framed."""
    parts: list[bytes] = []
    given_framed: list[bytes] = []

    def chunk(frame: bytes, start: int) -> bool:
        given_framed.append(frame)
        if takes:
            parts.append(frame[start:-2])
        return takes

    async with engine(reads, 0.002) as pool:
        for _ in range(2):
            response = await pool.start(b"GET", b"/")
            await response.pipe(lambda data, last: parts.append(data), chunk)
            assert (pool.connections, pool.busy) == (1, 0)
    return b"".join(parts), given_framed


@settings(max_examples=40)
@given(st.lists(st.sampled_from(list(FRAMES)), max_size=5), st.lists(st.integers(0, 200), max_size=4), st.booleans())
def test_a_body_is_the_same_however_it_is_cut_and_whoever_takes_its_chunks(
    frames: list[bytes], cuts: list[int], takes: bool
) -> None:
    sent = CHUNKED + b"".join(frames) + b"0\r\n\r\n"
    places = sorted({0, len(sent), *(len(CHUNKED) + cut for cut in cuts if len(CHUNKED) + cut < len(sent))})
    body, given_framed = run(piped([sent[a:b] for a, b in itertools.pairwise(places)], takes))

    assert body == b"".join(FRAMES[frame] for frame in frames) * 2
    assert set(given_framed) <= set(frames)


def test_a_chunk_that_comes_by_itself_is_given_as_it_is_framed() -> None:
    one, two, three, four, five = map(framed, (b"one", b"two ", b"three", b"fourth", b"fifth!!"))
    body, given_framed = run(piped([CHUNKED + one, two, three + four, five[:4], five[4:], b"0\r\n\r\n"], takes=True))

    assert body == b"onetwo threefourthfifth!!" * 2
    assert given_framed == [two] * 2


@pytest.mark.parametrize(
    ("reads", "text"), [((b"0", framed(b"hello")), b"hello"), ((b"a\r\n", framed(b"hello"), b"\r\n"), framed(b"hello"))]
)
def test_a_part_of_a_chunk_that_looks_like_a_chunk_is_none(reads: tuple[bytes, ...], text: bytes) -> None:
    body, given_framed = run(piped([CHUNKED + framed(b"one"), *reads, b"0\r\n\r\n"], takes=True))

    assert (body, given_framed) == ((b"one" + text) * 2, [])


def test_an_answer_that_is_held_up_where_its_chunk_goes_is_not_late_until_it_may_go_on() -> None:
    async def held() -> tuple[bool, str]:
        async with engine([CHUNKED + framed(b"one"), framed(b"two")], 0.05) as pool:
            response = await pool.start(b"GET", b"/", idle_s=0.1)

            def chunk(frame: bytes, start: int) -> bool:
                response.pause()
                return True

            piping = asyncio.ensure_future(response.pipe(lambda data, last: None, chunk))
            await asyncio.sleep(0.6)
            waited = not piping.done()
            response.resume()
            with pytest.raises(UpstreamError) as found:
                await piping
            return waited, found.value.kind

    assert run(held()) == (True, "timeout")


def test_an_answer_with_another_status_is_left_to_be_read_whole() -> None:
    pieces: list[bytes] = []

    async def refused() -> tuple[int, bytes]:
        async with engine([b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nb", b"usy"], 0.05) as pool:
            response = await pool.start(b"GET", b"/")
            await response.pipe(lambda data, last: pieces.append(data), status=200)
            return response.status, await response.body()

    assert run(refused()) == (503, b"busy")
    assert not pieces
