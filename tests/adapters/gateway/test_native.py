"""SGLang's own API goes through the gateway like the OpenAI API."""

import asyncio
import json
from typing import Any

import pytest
from builders import step_times
from emulated import MODEL, call, events, options, run, until
from gateways import KINDS, behind_gateway, pair

from kairos.adapters.emulator.faults import Fault

SGLANG = ["plain sglang", "sglang"]


def asked(stream: bool = False, tokens: int = 3, **changes: Any) -> dict[str, Any]:
    return {"text": "x" * 40, "sampling_params": {"max_new_tokens": tokens}, "stream": stream} | changes


@pytest.mark.parametrize("kind", SGLANG)
@pytest.mark.parametrize("prompt", [{}, {"text": None, "input_ids": [1] * 10}])
def test_an_answer_is_the_engines(kind: str, prompt: dict[str, Any]) -> None:
    async def work() -> tuple[int, Any, int, int]:
        async with behind_gateway(*KINDS[kind]) as (gateway, _):
            body = {name: value for name, value in (asked() | prompt).items() if value is not None}
            status, told = await call(gateway.server.address, "/generate", body)
            outcomes = gateway.metrics.outcomes["finished", ""]
            return status, json.loads(told), outcomes, gateway.metrics.tpot._counts[-1]

    status, told, finished, _ = run(work())

    assert (status, told["text"], finished) == (200, " t1 t2 t3", 1)
    assert told["meta_info"]["prompt_tokens"] == 10


@pytest.mark.parametrize("kind", SGLANG)
def test_a_stream_passes_event_by_event_and_its_tokens_are_counted(kind: str) -> None:
    async def work() -> tuple[list[Any], list[int]]:
        seen: list[int] = []
        async with behind_gateway(*KINDS[kind]) as (gateway, _):
            ended = gateway.app._ended
            gateway.app._ended = lambda call, *how: (seen.append(call.output_tokens), ended(call, *how))[1]
            _, told = await call(gateway.server.address, "/generate", asked(stream=True))
            return events(told), seen

    told, seen = run(work())

    assert told[-1] == "[DONE]"
    assert told[-2]["text"] == " t1 t2 t3"
    assert told[-2]["meta_info"]["completion_tokens"] == 3
    assert seen == [3]


def test_requests_of_both_apis_are_ordered_together() -> None:
    plain = {"prefill_placement": "late", "decode_placement": "least-requests", "decode": "continuous"}
    ordered = {"strategies": {"sjf": {"prefill": "sjf"} | plain}, "active": "sjf"}

    async def work() -> list[str]:
        slow = step_times(prefill=(0.0, 1e-4, 0.0))
        worker = options(engine="sglang", step_times=slow)
        async with behind_gateway(worker, group={"in_flight": 1}, **ordered) as (gateway, _):
            done: list[str] = []

            async def one(name: str, path: str, body: dict[str, Any]) -> None:
                await call(gateway.server.address, path, body | {"stream": True})
                done.append(name)

            async with asyncio.TaskGroup() as group:
                group.create_task(one("first", "/generate", asked(input_ids=[1] * 1000, text=None)))
                await until(lambda: bool(gateway.app.calls))
                long = {"model": MODEL, "prompt": [1] * 300, "max_tokens": 1}
                group.create_task(one("long", "/v1/completions", long))
                await until(lambda: len(gateway.scheduler.waiting) == 1)
                group.create_task(one("short", "/generate", asked(tokens=1)))
            return done[1:]

    assert run(work()) == ["short", "long"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_sequences_and_their_tokens_go_to_an_instance_that_does_both(stream: bool) -> None:
    async def work() -> tuple[int, Any]:
        async with behind_gateway(options(engine="sglang")) as (gateway, _):
            body = asked(stream, text=["a", "b"], sampling_params={"max_new_tokens": 2, "n": 2})
            status, told = await call(gateway.server.address, "/generate", body)
            return status, told

    status, told = run(work())

    assert status == 200
    answers = {event["index"]: event for event in events(told)[:-1]}.values() if stream else json.loads(told)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [2] * 4


@pytest.mark.parametrize(
    ("kinds", "body", "status", "code"),
    [
        (pair(), asked(), 404, "not_found"),
        (KINDS["sglang"], {"sampling_params": {}}, 400, "prompt_missing"),
        (KINDS["sglang"], asked(text=[1, "x"]), 400, "invalid_field"),
        (KINDS["sglang"], asked(sampling_params={"n": 2}), 400, "several_sequences"),
        (KINDS["sglang"], asked(sampling_params={"n": "x"}), 400, "invalid_field"),
        (KINDS["sglang"], asked(sampling_params=3), 400, "invalid_field"),
        (KINDS["sglang"], asked(sampling_params=[3]), 400, "invalid_field"),
        (KINDS["sglang"], asked(model="other"), 404, "model_not_found"),
    ],
)
def test_bad_input_is_refused_with_a_status_and_a_code(kinds: Any, body: Any, status: int, code: str) -> None:
    async def work() -> tuple[int, str]:
        async with behind_gateway(*kinds) as (gateway, _):
            answered, told = await call(gateway.server.address, "/generate", body)
            return answered, json.loads(told)["error"]["code"]

    assert run(work()) == (status, code)


def test_a_fleet_of_several_models_must_be_told_which() -> None:
    async def work() -> tuple[int, str, int]:
        wanted = [options(engine="sglang", models=(name,)) for name in ("a", "b")]
        async with behind_gateway(*wanted) as (gateway, running):
            for instance, name in zip(gateway.scheduler.instances.values(), "ab", strict=True):
                instance.serves = frozenset(name)
            gateway.scheduler.rebuild()
            _, told = await call(gateway.server.address, "/generate", asked())
            await call(gateway.server.address, "/generate", asked(model="b"))
            return running[0].requests, json.loads(told)["error"]["code"], running[1].requests

    assert run(work()) == (0, "model_missing", 1)


@pytest.mark.parametrize("kind", SGLANG)
def test_an_engine_that_fails_in_a_stream_is_told_as_everywhere(kind: str) -> None:
    async def work() -> tuple[int, str]:
        async with behind_gateway(*KINDS[kind]) as (gateway, running):
            running[-1].faults.set({Fault.SSE_ERROR: 1.0})
            status, told = await call(gateway.server.address, "/generate", asked(stream=True))
            return status, json.loads(told)["error"]["code"]

    assert run(work()) == (502, "engine_error")
