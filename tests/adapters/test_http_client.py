"""What an answer from upstream may take; the gateway's own tests look at the rest."""

import asyncio

import pytest
from emulated import run

from kairos.adapters.http_client import HttpPool, UpstreamError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


async def asked(*pieces: bytes, first_byte_s: float = 60.0) -> bytes:
    """What comes of pieces that are half a second apart where 0.1 s may pass between two of the body."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for n, piece in enumerate(pieces):
            await asyncio.sleep(0.5 * bool(n))
            writer.write(piece)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pool = HttpPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        response = await pool.send(b"GET", b"/", (), first_byte_s=first_byte_s, idle_s=0.1)
        return await response.body()
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


def test_an_engine_that_says_200_may_take_its_time_until_the_first_token() -> None:
    assert run(asked(HEAD, b"ok")) == b"ok"


@pytest.mark.parametrize("first_byte_s", [60.0, 0.1])
def test_what_stops_in_the_middle_or_does_not_begin_is_given_up(first_byte_s: float) -> None:
    pieces = (HEAD + b"o", b"k") if first_byte_s > 1 else (HEAD, b"ok")

    with pytest.raises(UpstreamError) as found:
        run(asked(*pieces, first_byte_s=first_byte_s))

    assert found.value.kind == "timeout"
