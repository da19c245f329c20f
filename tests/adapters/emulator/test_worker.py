"""An emulated worker speaks its engine's dialect, keeps step times, hands KV over, and fails on purpose."""

import asyncio
import json
from typing import Any

import pytest
from builders import step_times
from emulated import MODEL, call, events, options, run, until, workers

from kairos.adapters.emulator.faults import Fault
from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.http_client import HttpPool, UpstreamError

PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x" * 40, "max_tokens": 3} | changes


def test_a_completion_has_as_many_tokens_as_were_allowed_and_says_so() -> None:
    async def work() -> Any:
        async with workers(options()) as [worker]:
            return json.loads((await call(worker.address, "/v1/completions", completion()))[1])

    body = run(work())

    assert body["choices"][0]["text"] == " t1 t2 t3"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (10, 3)


def test_a_stream_has_an_event_a_token_then_usage_if_asked_for_then_done() -> None:
    async def work() -> list[Any]:
        async with workers(options()) as [worker]:
            asked = completion(stream=True, stream_options={"include_usage": True})
            return events((await call(worker.address, "/v1/completions", asked))[1])

    told = run(work())

    assert [event["choices"][0]["text"] for event in told[:3]] == [" t1", " t2", " t3"]
    assert told[3]["usage"]["completion_tokens"] == 3
    assert told[4:] == ["[DONE]"]


def test_a_chat_opens_with_its_role() -> None:
    async def work() -> list[Any]:
        async with workers(options()) as [worker]:
            asked = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}
            return events((await call(worker.address, "/v1/chat/completions", asked))[1])

    told = run(work())

    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert told[1]["choices"][0]["delta"] == {"content": " t1"}


def test_n_and_lists_of_prompts_are_as_many_sequences() -> None:
    async def work() -> Any:
        async with workers(options()) as [worker]:
            asked = completion(prompt=[[1, 2], [3]], n=2)
            return json.loads((await call(worker.address, "/v1/completions", asked))[1])

    body = run(work())

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"{", 400),
        (completion(model="other"), 404),
        (completion(prompt=None), 400),
        (completion(max_tokens=-1), 400),
        (completion(priority="high"), 400),
    ],
)
def test_a_request_that_cannot_be_served_gets_an_error_of_the_openai_shape(asked: object, status: int) -> None:
    async def work() -> tuple[int, bytes]:
        async with workers(options()) as [worker]:
            return await call(worker.address, "/v1/completions", asked)

    answered, body = run(work())

    assert answered == status
    assert json.loads(body)["error"]["code"] == status


def test_steps_last_as_the_profile_says_and_share_the_batch() -> None:
    """Prefill of 10 tokens 20 ms, decode steps of 10 ms + 1 ms a participant."""
    steps: list[Any] = []
    times = step_times(prefill=(0.01, 1e-3, 0.0), decode=(0.01, 1e-3, 0.0))
    limits = Limits(max_requests_per_step=2)

    async def work() -> None:
        async with workers(options(step_times=times, limits=limits, on_step=steps.append, time_scale=0.1)) as [worker]:
            both = [call(worker.address, "/v1/completions", completion(prompt=[1] * 10)) for _ in range(2)]
            await asyncio.gather(*both)

    run(work())

    together = [step for step in steps if step.batch_size == 2]
    assert {round(step.step_s, 6) for step in together} == {0.012}
    assert sum(step.new_tokens for step in steps) == 20
    assert all(round(step.step_s, 6) in (0.02, 0.03) for step in steps if step.kind == "prefill")


def test_kv_that_does_not_fit_waits() -> None:
    steps: list[Any] = []
    limits = Limits(kv_tokens=30, max_requests_per_step=4)

    async def work() -> None:
        async with workers(options(limits=limits, on_step=steps.append)) as [worker]:
            await asyncio.gather(*(call(worker.address, "/v1/completions", completion()) for _ in range(4)))

    run(work())

    assert max(step.batch_size for step in steps) == 2


def test_vllm_runs_lower_priorities_first_and_sglang_higher_ones() -> None:
    async def first_done(engine: str) -> int:
        times = step_times(prefill=(0.1, 0.0, 0.0))
        async with workers(options(engine=engine, step_times=times)) as [worker]:
            done: list[int] = []

            async def ask(priority: int) -> None:
                await call(worker.address, "/v1/completions", completion(priority=priority, max_tokens=1))
                done.append(priority)

            async with asyncio.TaskGroup() as group:
                group.create_task(ask(0))
                await until(lambda: bool(worker.gpu.prompts))
                await asyncio.sleep(0.01)  # its step has begun
                group.create_task(ask(5))
                group.create_task(ask(1))
                await until(lambda: len(worker.gpu.prompts) == 3)
            return done[1]

    assert run(first_done("vllm")) == 1
    assert run(first_done("sglang")) == 5


def test_a_shared_prefix_is_reported_as_cached() -> None:
    async def work() -> int:
        async with workers(options(prefix_cache=True)) as [worker]:
            await call(worker.address, "/v1/completions", completion(prompt=[1] * 64))
            second = await call(worker.address, "/v1/completions", completion(prompt=[1] * 48 + [2] * 16))
            return int(json.loads(second[1])["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert run(work()) == 48


# -- handing over


def test_nixl_hands_the_kv_over_once_and_the_decode_leg_says_every_token_again() -> None:
    async def work() -> tuple[Any, int, int]:
        async with workers(options(role="prefill"), options(role="decode")) as [prefill, decode]:
            made = await call(prefill.address, "/v1/completions", completion(max_tokens=1, kv_transfer_params=PRODUCE))
            params = json.loads(made[1])["kv_transfer_params"]
            held = len(prefill.desk)
            told = await call(decode.address, "/v1/completions", completion(kv_transfer_params=params))
            return json.loads(told[1]), held, len(prefill.desk)

    body, held, left = run(work())

    assert body["choices"][0]["text"] == " t1 t2 t3"
    assert (held, left) == (1, 0)


def test_kv_taken_twice_or_after_its_lease_is_answered_and_counted_as_vllm_does() -> None:
    async def work() -> tuple[list[int], int, int]:
        async with workers(options(role="prefill", lease_s=0.05), options(role="decode")) as [prefill, decode]:
            statuses = []
            for pause_s in (0.0, 0.1):
                made = await call(prefill.address, "/v1/completions", completion(kv_transfer_params=PRODUCE))
                asked = completion(kv_transfer_params=json.loads(made[1])["kv_transfer_params"])
                await asyncio.sleep(pause_s)
                for _ in range(2):
                    statuses.append((await call(decode.address, "/v1/completions", asked))[0])
            return statuses, prefill.desk.invalid_reads, prefill.desk.expired

    statuses, invalid, expired = run(work())

    assert statuses == [200] * 4
    assert (invalid, expired) == (3, 1)


def test_a_decode_worker_whose_prefill_worker_is_gone_answers_500_or_an_error_event() -> None:
    async def work() -> list[tuple[int, bytes]]:
        async with workers(options(role="prefill"), options(role="decode")) as [prefill, decode]:
            made = await call(prefill.address, "/v1/completions", completion(kv_transfer_params=PRODUCE))
            params = json.loads(made[1])["kv_transfer_params"]
            await prefill.stop()
            asked = [completion(kv_transfer_params=params, stream=stream) for stream in (False, True)]
            return [await call(decode.address, "/v1/completions", each) for each in asked]

    whole, streamed = run(work())

    assert whole[0] == 500
    assert streamed[0] == 200
    assert "error" in events(streamed[1])[-2]


@pytest.mark.parametrize("order", ["prefill first", "decode first"])
def test_mooncake_legs_meet_in_either_order(order: str) -> None:
    async def work() -> list[Any]:
        kinds = options(role="prefill", connector="mooncake"), options(role="decode", connector="mooncake")
        async with workers(*kinds) as [prefill, decode]:
            assert prefill.bootstrap is not None
            address = prefill.bootstrap.address
            engine_id = json.loads((await call(address, "/query"))[1])["0"]["engine_id"]
            produce = PRODUCE | {"transfer_id": "a"}
            consume = {
                "do_remote_prefill": True,
                "remote_bootstrap_addr": address,
                "remote_engine_id": engine_id,
                "transfer_id": "a",
            }
            legs = [
                call(prefill.address, "/v1/completions", completion(max_tokens=1, kv_transfer_params=produce)),
                call(decode.address, "/v1/completions", completion(kv_transfer_params=consume)),
            ]
            if order == "decode first":
                legs.reverse()
            tasks = [asyncio.ensure_future(legs[0])]
            await asyncio.sleep(0.02)
            answers = await asyncio.gather(*tasks, legs[1])
            return sorted(json.loads(body)["usage"]["completion_tokens"] for _, body in answers)

    assert run(work()) == [1, 3]


def test_sglang_prefill_begins_when_decode_has_asked_for_it() -> None:
    async def work() -> tuple[int, Any]:
        kinds = options(engine="sglang", role="prefill"), options(engine="sglang", role="decode")
        async with workers(*kinds) as [prefill, decode]:
            assert prefill.bootstrap is not None
            place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.bootstrap.port, "bootstrap_room": 7}
            first = asyncio.ensure_future(call(prefill.address, "/v1/completions", completion(**place)))
            await until(lambda: bool(len(prefill.desk)))
            await asyncio.sleep(0.02)
            steps = prefill.gpu.steps
            told = await call(decode.address, "/v1/completions", completion(**place))
            await first
            return steps, json.loads(told[1])

    steps, body = run(work())

    assert steps == 0
    assert body["choices"][0]["text"] == " t1 t2 t3"


def test_a_prefill_leg_that_is_given_up_fails_its_decode_leg() -> None:
    async def work() -> int:
        kinds = options(engine="sglang", role="prefill"), options(engine="sglang", role="decode")
        async with workers(options(**vars_of(kinds[0], 100.0)), kinds[1]) as [prefill, decode]:
            assert prefill.bootstrap is not None
            place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill.bootstrap.port, "bootstrap_room": 7}
            second = asyncio.ensure_future(call(decode.address, "/v1/completions", completion(**place)))
            pool = HttpPool(prefill.address)
            first = asyncio.ensure_future(
                pool.send(b"POST", b"/v1/completions", (), json.dumps(completion(**place)).encode())
            )
            await until(lambda: bool(prefill.gpu.prompts))
            pool.close()
            await asyncio.gather(first, return_exceptions=True)
            return (await second)[0]

    assert run(work()) == 500


def vars_of(kind: Any, slow: float) -> dict[str, Any]:
    return {"engine": kind.engine, "role": kind.role, "step_times": step_times(prefill=(slow, 0.0, 0.0))}


# -- ends


def test_a_client_that_leaves_ends_its_request() -> None:
    async def work() -> tuple[int, int]:
        async with workers(options()) as [worker]:
            pool = HttpPool(worker.address)
            body = json.dumps(completion(stream=True, max_tokens=100_000)).encode()
            answer = await pool.send(b"POST", b"/v1/completions", (), body)
            await answer.chunk()
            began = worker.gpu.running
            pool.close()
            await until(lambda: not worker.gpu.running)
            return began, worker.server.connections

    assert run(work()) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_injected_faults_show(stream: bool) -> None:
    async def outcome(fault: Fault) -> str:
        async with workers(options(faults={fault: 1.0})) as [worker]:
            pool = HttpPool(worker.address)
            raw = json.dumps(completion(stream=stream)).encode()
            try:
                answer = await pool.send(b"POST", b"/v1/completions", (), raw, first_byte_s=0.3)
                body = await answer.body()
            except UpstreamError as problem:
                return problem.kind
            finally:
                pool.close()
            failed = answer.status >= 500 or b'data: {"error"' in body
            return f"{answer.status} {'error' if failed else 'answer'}"

    told = {fault: run(outcome(fault)) for fault in Fault}

    assert told == {
        Fault.CUT: "lost",
        Fault.HANG: "timeout",
        Fault.SSE_ERROR: "200 error" if stream else "500 error",
        Fault.SLOW: "200 answer",
        Fault.REFUSE: "503 error",
    }


def test_faults_change_while_it_runs() -> None:
    async def work() -> list[int]:
        async with workers(options()) as [worker]:
            before = (await call(worker.address, "/v1/completions", completion()))[0]
            changed = (await call(worker.address, "/emulated/faults", {"refuse": 1.0}, method=b"PUT"))[0]
            wrong = (await call(worker.address, "/emulated/faults", {"unheard-of": 1.0}, method=b"PUT"))[0]
            return [before, changed, wrong, (await call(worker.address, "/v1/completions", completion()))[0]]

    assert run(work()) == [200, 200, 400, 503]


@pytest.mark.parametrize(("engine", "name"), [("vllm", "vllm:num_requests_running"), ("sglang", "sglang:token_usage")])
def test_metrics_have_the_names_of_the_engine(engine: str, name: str) -> None:
    async def work() -> bytes:
        async with workers(options(engine=engine)) as [worker]:
            return (await call(worker.address, "/metrics"))[1]

    assert name.encode() in run(work())
