"""Requests through the gateway to every kind of engine, answered as the OpenAI API says."""

import json
from typing import Any

import pytest
from emulated import MODEL, call, events, run, until
from gateways import KINDS, behind_gateway

COMPLETION = {"model": MODEL, "prompt": "x" * 40, "max_tokens": 4}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


async def ask(kind: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with behind_gateway(*KINDS[kind]) as (gateway, _):
        return await call(gateway.server.address, path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_is_answered(kind: str) -> None:
    status, body = run(ask(kind, "/v1/completions", COMPLETION))

    assert (status, json.loads(body)["choices"][0]["text"]) == (200, " t1 t2 t3 t4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_streamed_without_the_usage_that_nobody_asked_for(kind: str) -> None:
    status, body = run(ask(kind, "/v1/chat/completions", CHAT | {"stream": True}))
    told = events(body)

    assert status == 200
    assert "".join(event["choices"][0]["delta"]["content"] for event in told[:-1]) == " t1 t2 t3 t4"
    assert told[-1] == "[DONE]"


@pytest.mark.parametrize("kind", KINDS)
def test_the_usage_that_was_asked_for_comes_through(kind: str) -> None:
    asked = COMPLETION | {"stream": True, "stream_options": {"include_usage": True}}

    told = events(run(ask(kind, "/v1/completions", asked))[1])

    assert told[-2]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_was_answered_counts_as_finished(kind: str, stream: bool) -> None:
    async def work() -> dict[tuple[str, str], int]:
        async with behind_gateway(*KINDS[kind]) as (gateway, _):
            for _ in range(3):
                await call(gateway.server.address, "/v1/completions", COMPLETION | {"stream": stream})
            await until(lambda: not gateway.app.calls)
            return dict(gateway.metrics.outcomes)

    assert run(work()) == {("finished", ""): 3}
