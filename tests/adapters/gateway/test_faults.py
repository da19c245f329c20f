"""Whatever fails, every request ends once, the client learns how, and nothing stays behind."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from builders import step_times
from emulated import MODEL, call, events, options, run, until
from gateways import KINDS, NOTHING, QUICK, behind_gateway, left_behind, pair, running_gateway, settings_for

from kairos.adapters.asgi import answer, body_of
from kairos.adapters.asgi_server import AsgiServer
from kairos.adapters.emulator.faults import Fault, Faults
from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.emulator.worker import EmulatedWorker
from kairos.adapters.gateway import health
from kairos.adapters.gateway.gateway import Gateway
from kairos.adapters.http_client import HttpPool, UpstreamError


def asked(stream: bool = True, **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "x" * 40, "max_tokens": 4, "stream": stream} | changes


def code_of(body: bytes) -> str:
    """The code of an error, of a body or of the last event of a stream."""
    if body.startswith(b"data: "):
        return str(next(event for event in events(body) if event != "[DONE]" and "error" in event)["error"]["code"])
    return str(json.loads(body)["error"]["code"])


class Once(Faults):
    """A fault for the first request alone."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._first: Fault | None = fault

    def draw(self) -> Fault | None:
        fault, self._first = self._first, None
        return fault


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_with_every_fault_each_request_has_one_outcome_and_nothing_stays_behind(kind: str, stream: bool) -> None:
    async def work() -> tuple[int, Counter[str], list[int]]:
        async with behind_gateway(*KINDS[kind], gateway=QUICK, group={"in_flight": 8}) as (gateway, running):
            for worker in running:
                worker.faults.set(dict.fromkeys(Fault, 0.05))
            pool = HttpPool(gateway.server.address)
            slots = asyncio.Semaphore(32)
            told: Counter[str] = Counter()

            async def one(number: int) -> None:
                async with slots:
                    raw = json.dumps(asked(stream)).encode()
                    try:
                        answer = await pool.send(b"POST", b"/v1/completions", (), raw)
                        if number % 20 == 0:  # a client that leaves
                            answer.close()
                            told["left"] += 1
                            return
                        body = await answer.body()
                        told["answered" if b"error" not in body else code_of(body)] += 1
                    except UpstreamError as problem:
                        told[problem.kind] += 1

            await asyncio.gather(*(one(number) for number in range(200)))
            pool.close()
            await until(lambda: left_behind(gateway) == NOTHING)
            await until(lambda: not sum(worker.gpu.running + worker.gpu.waiting for worker in running))
            return sum(gateway.metrics.outcomes.values()), told, [worker.desk.invalid_reads for worker in running]

    outcomes, told, invalid = run(work())

    assert outcomes == sum(told.values()) == 200
    assert not told.keys() & {"lost", "timeout", "protocol", "connect"}, "the gateway itself answers every request"
    assert told["answered"]
    assert sum(invalid) == 0


# -- engines that die

SLOW_PREFILL = step_times(prefill=(0.1, 1e-6, 0.0), decode=(1e-3, 0.0, 0.0))
SLOW_DECODE = step_times(prefill=(0.0, 1e-6, 0.0), decode=(0.02, 0.0, 0.0))


async def die(worker: EmulatedWorker) -> None:
    """As a process that is killed: no more answers, no more connections."""
    await worker.stop()


def test_a_prefill_engine_that_died_before_is_not_used_again_until_it_is_back() -> None:
    async def work() -> tuple[list[int], str, int]:
        async with behind_gateway(*pair()) as (gateway, [prefill, _]):
            await die(prefill)
            while_dead = [(await call(gateway.server.address, "/v1/completions", asked()))[0] for _ in range(2)]
            state = gateway.scheduler.instances["prefill-0"].state
            again = EmulatedWorker(options(role="prefill", port=prefill.server.port))
            await again.start()
            await until(lambda: gateway.scheduler.instances["prefill-0"].is_ready)
            back = (await call(gateway.server.address, "/v1/completions", asked()))[0]
            await again.stop()
            return while_dead, state, back

    while_dead, state, back = run(work())

    assert while_dead == [503, 503]
    assert (state, back) == ("down", 200)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("kind", ["nixl", "sglang", "mooncake"])
def test_a_prefill_engine_that_dies_during_prefill_costs_a_retry_or_an_error(kind: str, others: int) -> None:
    async def work() -> tuple[int, bytes]:
        prefill, decode = KINDS[kind]
        slow = options(engine=prefill.engine, connector=prefill.connector, role="prefill", step_times=SLOW_PREFILL)
        async with behind_gateway(slow, decode, *[prefill] * others) as (gateway, [first, *_]):
            request = asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked()))
            await until(lambda: bool(first.gpu.prompts))
            await die(first)
            return await request

    status, body = run(work())

    if others:
        assert (status, events(body)[-1]) == (200, "[DONE]")
    else:
        assert status in (502, 503)
        assert code_of(body) in ("engine_lost", "engine_error", "no_instance", "engine_unreachable")


def test_a_prefill_engine_that_dies_after_prefill_is_tried_elsewhere_with_new_kv() -> None:
    """The only decode slot is taken for a while, so that the KV waits at the prefill engine when it dies."""

    async def work() -> tuple[int, bytes, int]:
        prefill, _ = pair()
        full = options(role="decode", limits=Limits(max_batch=1), step_times=SLOW_DECODE)
        async with behind_gateway(prefill, full, prefill) as (gateway, [first, decode, _]):
            other = asyncio.ensure_future(call(decode.address, "/v1/completions", asked(max_tokens=12)))
            await until(lambda: bool(decode.gpu.residents))
            request = asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked()))
            await until(lambda: bool(len(first.desk)))
            await die(first)
            await other
            return *(await request), gateway.relay.retries

    status, body, retries = run(work())

    assert (status, events(body)[-1], retries) == (200, "[DONE]", 1)


def test_a_decode_engine_that_dies_in_a_stream_ends_it_with_an_error_event() -> None:
    async def work() -> tuple[int, bytes]:
        prefill, _ = pair()
        slow = options(role="decode", step_times=SLOW_DECODE)
        async with behind_gateway(prefill, slow) as (gateway, [_, decode]):
            pool = HttpPool(gateway.server.address)
            raw = json.dumps(asked(max_tokens=1000)).encode()
            answer = await pool.send(b"POST", b"/v1/completions", (), raw)
            first = await answer.chunk()
            await die(decode)
            body = first + await answer.body()
            pool.close()
            await until(lambda: left_behind(gateway) == NOTHING)
            return answer.status, body

    status, body = run(work())

    assert (status, code_of(body), events(body)[-1]) == (200, "engine_lost", "[DONE]")


def test_an_engine_that_hangs_is_found_out_and_its_requests_end() -> None:
    async def work() -> tuple[int, str]:
        async with behind_gateway(*pair(), gateway=QUICK) as (gateway, [prefill, _]):
            prefill.faults.set({Fault.HANG: 1.0})
            status, body = await call(gateway.server.address, "/v1/completions", asked())
            return status, code_of(body)

    assert run(work()) == (504, "engine_timeout")


def test_an_engine_that_answers_no_health_check_any_more_loses_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PROBE_S", 0.2)
    hangs = False

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET" and not hangs:
            await answer(send, 200, b'{"version": "0.32.0"}')
            return
        await body_of(receive)
        await receive()

    async def work() -> tuple[int, str, int]:
        nonlocal hangs
        server = AsgiServer(engine)
        await server.start()
        async with running_gateway(settings_for({"mixed": [{"profile": "p", "url": server.address}]})) as gateway:
            request = asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked()))
            await until(lambda: bool(gateway.app.calls))
            hangs = True
            status, body = await request
            count = len(gateway.app.calls)
        await server.stop()
        return status, code_of(body), count

    assert run(work()) == (503, "no_instance", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_tried_once_more_with_new_kv(stream: bool) -> None:
    async def work() -> tuple[int, int, int]:
        async with behind_gateway(*pair()) as (gateway, [prefill, decode]):
            decode.faults = Once(Fault.SSE_ERROR)
            status, _ = await call(gateway.server.address, "/v1/completions", asked(stream))
            return status, prefill.requests, prefill.desk.invalid_reads

    assert run(work()) == (200, 2, 0)


def test_an_error_that_stays_is_told_with_a_status() -> None:
    async def work() -> tuple[int, str, int]:
        async with behind_gateway(*pair()) as (gateway, [prefill, decode]):
            decode.faults.set({Fault.SSE_ERROR: 1.0})
            status, body = await call(gateway.server.address, "/v1/completions", asked())
            return status, code_of(body), prefill.requests

    assert run(work()) == (502, "engine_error", 2)


# -- KV leases


def test_kv_that_a_decode_engine_does_not_take_in_time_is_computed_again() -> None:
    """The only decode slot is taken by an endless request of another gateway, so the KV would wait for ever."""

    async def work() -> tuple[int, str, int, int]:
        prefill, _ = pair()
        full = options(role="decode", limits=Limits(max_batch=1), step_times=step_times(decode=(100.0, 0.0, 0.0)))
        gateway_settings = QUICK | {
            "kv_lease_s": 0.2,
            "timeouts": QUICK["timeouts"] | {"first_token_s": 5, "total_s": 5, "idle_s": 5},
        }
        async with behind_gateway(prefill, full, gateway=gateway_settings) as (gateway, [first, decode]):
            other = asyncio.ensure_future(call(decode.address, "/v1/completions", asked(max_tokens=10)))
            await until(lambda: bool(decode.gpu.residents or decode.gpu.prompts))
            status, body = await call(gateway.server.address, "/v1/completions", asked())
            other.cancel()
            return status, code_of(body), first.requests, first.desk.invalid_reads

    assert run(work()) == (504, "kv_expired", 2, 0)


# -- clients that leave


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["waiting", "prefill", "decode"])
def test_a_client_that_leaves_frees_everything_at_once(kind: str, stage: str) -> None:
    async def work() -> int:
        slow = step_times(prefill=(0.05 if stage != "decode" else 0.0, 1e-6, 0.0), decode=(0.02, 0.0, 0.0))
        wanted = [options(engine=o.engine, role=o.role, connector=o.connector, step_times=slow) for o in KINDS[kind]]
        async with behind_gateway(*wanted, group={"in_flight": 1}) as (gateway, running):
            first = running[0]
            pools = [HttpPool(gateway.server.address) for _ in range(2)]
            raw = json.dumps(asked(max_tokens=500)).encode()
            requests = [asyncio.ensure_future(p.send(b"POST", b"/v1/completions", (), raw)) for p in pools]
            if stage == "waiting":
                await until(lambda: len(gateway.scheduler.waiting) == 1)
            elif stage == "prefill":
                await until(lambda: bool(first.gpu.prompts))
            else:
                await asyncio.gather(*requests)
            for pool in pools:
                pool.close()
            await until(lambda: left_behind(gateway) == NOTHING)
            await until(lambda: not sum(w.gpu.running + w.gpu.waiting for w in running))
            await asyncio.gather(*requests, return_exceptions=True)
            return gateway.metrics.outcomes["client_left", "client_left"]

    assert run(work()) == 2


# -- bad input


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", b"{", 400, "invalid_json"),
        ("/v1/completions", b"[]", 400, "invalid_json"),
        ("/v1/completions", b'{"model": "tiny", "prompt": [1, "x"]}', 400, "invalid_field"),
        ("/v1/completions", b'{"model": "tiny"}', 400, "prompt_missing"),
        ("/v1/chat/completions", b'{"model": "tiny"}', 400, "messages_missing"),
        ("/v1/completions", b'{"prompt": "x"}', 400, "model_missing"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "stream": "yes"}', 400, "invalid_field"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "n": -1}', 400, "invalid_field"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "n": 2}', 400, "several_sequences"),
        ("/v1/completions", b'{"model": "other", "prompt": "x"}', 404, "model_not_found"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "' + b"x" * 4000 + b'"}', 413, "body_too_large"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "max_tokens": -1}', 400, "400"),
        ("/v1/embeddings", b"{", 400, "invalid_json"),
        ("/metrics", b"{}", 404, "not_found"),
        ("/abort_requests", b"{}", 404, "not_found"),
    ],
)
def test_bad_input_is_refused_with_a_status_and_a_code(path: str, body: bytes, status: int, code: str) -> None:
    async def work() -> tuple[int, bytes]:
        async with behind_gateway(*pair(), gateway={"max_body_bytes": 2000}) as (gateway, _):
            headers = ((b"content-type", b"application/json"),)
            return await call(gateway.server.address, path, body, headers)

    answered, told = run(work())

    assert (answered, code_of(told)) == (status, code)


def test_several_sequences_go_to_an_instance_that_does_both() -> None:
    async def work() -> tuple[int, bytes, int]:
        async with behind_gateway(*pair(), options()) as (gateway, [_, _, mixed]):
            asked_for = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "max_tokens": 2}
            status, body = await call(gateway.server.address, "/v1/completions", asked_for)
            return status, body, mixed.requests

    status, body, requests = run(work())

    assert (status, len(json.loads(body)["choices"]), requests) == (200, 4, 1)


def test_a_client_that_reads_slowly_holds_its_engine_up_and_the_gateway_keeps_little() -> None:
    """An engine that would send 40 MB at once cannot while nobody reads; all of it comes when somebody does."""
    event = b'data: {"choices":[{"index":0,"text":"' + b"x" * 10_000 + b'"}]}\n\n'
    sent = 0

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        if scope["method"] == "GET":
            await answer(send, 200, b'{"version": "0.32.0"}')
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(4_000):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            sent += len(event)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def work() -> tuple[int, int]:
        server = AsgiServer(engine)
        await server.start()
        fleet = {"mixed": [{"profile": "p", "url": server.address}]}
        async with running_gateway(settings_for(fleet)) as gateway:
            pool = HttpPool(gateway.server.address)
            got = await pool.send(b"POST", b"/v1/completions", (), json.dumps(asked()).encode())
            before = -1
            while before != sent:  # until it stands still
                before = sent
                await asyncio.sleep(0.1)
            whole = await got.body()
            pool.close()
        await server.stop()
        return before, len(whole)

    unread, whole = run(work())

    assert unread < 20_000_000, "what the kernel holds for two connections, and little more"
    assert whole == 4_000 * len(event) + len(b"data: [DONE]\n\n")


def test_a_client_that_leaves_another_path_ends_the_engines_work() -> None:
    working = asyncio.Event()
    left = asyncio.Event()

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await answer(send, 200, b'{"version": "0.32.0"}')
            return
        await body_of(receive)
        working.set()
        await receive()
        left.set()

    async def work() -> int:
        server = AsgiServer(engine)
        await server.start()
        async with running_gateway(settings_for({"mixed": [{"profile": "p", "url": server.address}]})) as gateway:
            pool = HttpPool(gateway.server.address)
            request = asyncio.ensure_future(pool.send(b"POST", b"/v1/embeddings", (), b"{}"))
            await working.wait()
            pool.close()
            await left.wait()
            await asyncio.gather(request, return_exceptions=True)
            await until(lambda: not gateway.app.others)
            requests = gateway.scheduler.instances["mixed-0"].requests
        await server.stop()
        return requests

    assert run(work()) == 0


# -- clients that do nothing


async def raw_client(gateway: Gateway, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that has sent so much and reads no more than fits in its buffers."""
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port, limit=1024)
    writer.write(sent)
    return reader, writer


def test_a_client_that_reads_nothing_loses_its_connection_and_its_request_ends() -> None:
    event = b'data: {"choices":[{"index":0,"text":"' + b"x" * 100_000 + b'"}]}\n\n'
    left = asyncio.Event()

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await answer(send, 200, b'{"version": "0.32.0"}')
            return
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def gone() -> None:
            await receive()
            left.set()

        watch = asyncio.ensure_future(gone())
        while not left.is_set():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await watch

    async def work() -> tuple[int, int, dict[str, int]]:
        server = AsgiServer(engine)
        await server.start()
        fleet = {"mixed": [{"profile": "p", "url": server.address}]}
        quick = {"timeouts": QUICK["timeouts"] | {"total_s": 1000, "first_token_s": 1000}}
        async with running_gateway(settings_for(fleet, quick)) as gateway:
            body = json.dumps(asked()).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
            _, writer = await raw_client(gateway, head + body)
            await until(lambda: gateway.stalled == 1)
            await until(lambda: left_behind(gateway) == NOTHING)
            await left.wait()
            writer.transport.abort()
            counted = gateway.metrics.outcomes["client_left", "client_left"]
            connections = gateway.server.connections
        await server.stop()
        return counted, connections, NOTHING

    assert run(work())[:2] == (1, 0)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: h\r\n"])
def test_a_client_that_sends_no_request_loses_its_connection(sent: bytes) -> None:
    async def work() -> tuple[bytes, int]:
        async with behind_gateway(options(), gateway=QUICK) as (gateway, _):
            reader, writer = await raw_client(gateway, sent)
            told = await reader.read()
            writer.close()
            return told, gateway.stalled

    assert run(work()) == (b"", 1)


@pytest.mark.parametrize("sent", [b"", b'{"model"'])
def test_a_body_that_does_not_come_is_answered_408(sent: bytes) -> None:
    async def work() -> tuple[bytes, int]:
        async with behind_gateway(options(), gateway=QUICK) as (gateway, _):
            head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\n"
            reader, writer = await raw_client(gateway, head + sent)
            status = await reader.readline()
            writer.close()
            return status.split()[1], gateway.metrics.outcomes["refused", "body_too_slow"]

    assert run(work()) == (b"408", 1)


def test_an_engine_whose_metrics_make_no_sense_is_served_all_the_same() -> None:
    metrics = b"vllm:num_requests_running{} NaN\nvllm:num_requests_waiting{} many\nvllm:kv_cache_usage_perc +Inf\n"

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 200, metrics if scope["path"] == "/metrics" else b'{"version": "0.32.0"}')

    async def work() -> bool:
        server = AsgiServer(engine)
        await server.start()
        async with running_gateway(settings_for({"mixed": [{"profile": "p", "url": server.address}]})) as gateway:
            ready = gateway.scheduler.instances["mixed-0"].is_ready
        await server.stop()
        return ready

    assert run(work())


def test_a_body_that_is_nested_too_deeply_is_no_json() -> None:
    async def work() -> tuple[int, str]:
        async with behind_gateway(options()) as (gateway, _):
            body = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
            status, told = await call(gateway.server.address, "/v1/completions", body)
            return status, code_of(told)

    assert run(work()) == (400, "invalid_json")
