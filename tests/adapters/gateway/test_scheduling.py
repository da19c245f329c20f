"""Who runs next and where is decided in the gateway, as late as possible, by the strategy in force."""

import asyncio
import json
from typing import Any

import pytest
from builders import step_times
from emulated import MODEL, call, options, run, until, workers
from gateways import behind_gateway, fleet_of, pair, running_gateway, settings_for

from kairos.adapters.emulator import worker as emulated_worker
from kairos.adapters.http_client import HttpPool


def strategies(active: str) -> dict[str, Any]:
    plain = {"prefill_placement": "late", "decode_placement": "least-requests", "decode": "continuous"}
    return {"strategies": {name: {"prefill": name} | plain for name in ("fcfs", "sjf")}, "active": active}


def asked(tokens: int, output: int = 1, **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": [1] * tokens, "max_tokens": output} | changes


def profiles(token_s: float) -> dict[str, Any]:
    """What the gateway is told of workers that take so long for a prompt token."""
    linear = {"prefill": {"b_s": token_s}, "decode": {"a_s": 1e-3}}
    return {"profiles": {"p": {"gpu": "H100", "model": MODEL, "step_times": {"linear": linear}}}}


async def order_of(active: str, lengths: list[int], in_flight: int = 1, token_s: float = 1e-4) -> list[int]:
    """The order in which prompts of these lengths are computed that arrive while a first one runs."""
    times = step_times(prefill=(0.0, token_s, 0.0))
    group, known = {"in_flight": in_flight}, profiles(token_s)
    async with behind_gateway(options(step_times=times), group=group, **strategies(active), **known) as (gateway, _):
        done: list[int] = []

        async def one(length: int) -> None:
            await call(gateway.server.address, "/v1/completions", asked(length, stream=True))
            done.append(length)

        async with asyncio.TaskGroup() as group:
            group.create_task(one(1000))
            await until(lambda: bool(gateway.app.calls))
            for number, length in enumerate(lengths, start=1):
                group.create_task(one(length))
                await until(lambda number=number: len(gateway.scheduler.waiting) == number)
        return done[1:]


def test_prompts_run_in_the_order_of_the_strategy() -> None:
    assert run(order_of("fcfs", [300, 100, 200])) == [300, 100, 200]
    assert run(order_of("sjf", [300, 100, 200])) == [100, 200, 300]


def test_a_request_that_comes_while_nothing_waits_goes_at_once_without_asking_for_an_order() -> None:
    async def work() -> tuple[list[int], int]:
        late: dict[str, Any] = {"guards": {"decision_budget_s": 1e-9}}
        async with behind_gateway(options(), **late) as (gateway, _):
            statuses = [
                (await call(gateway.server.address, "/v1/completions", asked(length)))[0] for length in (10, 20, 30)
            ]
            return statuses, sum(gateway.scheduler.fallbacks.values())

    assert run(work()) == ([200, 200, 200], 0)


def test_the_next_prompt_is_sent_no_sooner_than_the_one_before_it_is_about_to_end() -> None:
    assert run(order_of("sjf", [300, 100, 200], in_flight=2, token_s=1e-3)) == [100, 200, 300]


def test_a_request_goes_to_an_idle_instance_and_not_behind_another_one() -> None:
    async def work() -> set[str]:
        slow = step_times(prefill=(0.0, 1e-3, 0.0))
        wanted = (options(role="prefill", step_times=slow), *pair(step_times=slow))
        async with behind_gateway(*wanted, group={"in_flight": 2}, **strategies("fcfs")) as (gateway, _):
            places: set[str] = set()

            async def one(length: int) -> None:
                await call(gateway.server.address, "/v1/completions", asked(length))

            async with asyncio.TaskGroup() as group:
                for number in range(1, 3):
                    group.create_task(one(500))
                    await until(lambda number=number: len(gateway.app.calls) == number)
                    places |= {c.prefill.instance_id for c in gateway.app.calls.values() if c.prefill is not None}
            return places

    assert run(work()) == {"prefill-0", "prefill-1"}


def test_no_more_prompts_are_in_flight_than_the_group_allows() -> None:
    async def work() -> tuple[int, int]:
        slow = step_times(prefill=(0.02, 0.0, 0.0))
        async with behind_gateway(*pair(step_times=slow), group={"in_flight": 2}) as (gateway, [prefill, _]):
            most = 0
            requests = [
                asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked(10))) for _ in range(8)
            ]
            while not all(request.done() for request in requests):
                most = max(most, len(prefill.gpu.prompts))
                await asyncio.sleep(0.001)
            return most, prefill.requests

    assert run(work()) == (2, 8)


def test_a_strategy_is_switched_while_requests_wait_and_none_is_lost() -> None:
    async def work() -> tuple[list[int], str]:
        slow = step_times(prefill=(0.0, 1e-4, 0.0))
        settings = strategies("fcfs")
        async with behind_gateway(options(step_times=slow), group={"in_flight": 1}, **settings) as (gateway, _):
            done: list[int] = []

            async def one(length: int) -> None:
                await call(gateway.server.address, "/v1/completions", asked(length, stream=True))
                done.append(length)

            async with asyncio.TaskGroup() as group:
                for number, length in enumerate([1000, 300, 100, 200]):
                    group.create_task(one(length))
                    await until(lambda number=number: len(gateway.app.calls) == number + 1)
                gateway.scheduler.adopt(gateway.settings.strategies["sjf"].as_strategy("sjf"))
            return done, gateway.scheduler.decider.strategy.name

    assert run(work()) == ([1000, 100, 200, 300], "sjf")


def test_requests_spread_over_instances_and_the_headers_say_where() -> None:
    async def work() -> set[tuple[str, str]]:
        slow = step_times(prefill=(0.01, 0.0, 0.0), decode=(0.01, 0.0, 0.0))
        wanted = *pair(step_times=slow), *pair(step_times=slow)
        places: set[tuple[str, str]] = set()
        async with behind_gateway(*wanted, group={"in_flight": 1}, **strategies("fcfs")) as (gateway, _):
            pool = HttpPool(gateway.server.address)

            async def one() -> None:
                answer = await pool.send(b"POST", b"/v1/completions", (), json.dumps(asked(10, 8)).encode())
                await answer.body()
                names = b"x-kairos-prefill-instance", b"x-kairos-decode-instance"
                assert float(answer.header(b"x-kairos-decision-us")) > 0
                places.add((answer.header(names[0]).decode(), answer.header(names[1]).decode()))

            await asyncio.gather(*(one() for _ in range(8)))
            pool.close()
        return places

    places = run(work())

    assert {prefill for prefill, _ in places} == {"prefill-0", "prefill-1"}
    assert {decode for _, decode in places} == {"decode-0", "decode-1"}


def test_what_cannot_be_in_time_is_refused_with_a_time_to_come_back() -> None:
    async def work() -> tuple[int, Any, bytes]:
        slow = step_times(prefill=(0.0, 1e-3, 0.0))
        strict = {
            "prefill": "fcfs",
            "prefill_placement": "late",
            "decode_placement": "least-requests",
            "decode": "continuous",
            "admission": "on-arrival",
        }
        profile = {
            "gpu": "H100",
            "model": MODEL,
            "step_times": {"linear": {"prefill": {"b_s": 1e-3}, "decode": {"a_s": 1e-3}}},
        }
        changes = {"strategies": {"strict": strict}, "active": "strict", "profiles": {"p": profile}}
        async with behind_gateway(options(step_times=slow), **changes) as (gateway, _):
            pool = HttpPool(gateway.server.address)
            answer = await pool.send(b"POST", b"/v1/completions", (), json.dumps(asked(4000)).encode())
            body = json.loads(await answer.body())
            pool.close()
            return answer.status, body["error"]["code"], answer.header(b"retry-after")

    assert run(work()) == (503, "lost_on_arrival", b"2")


def test_more_than_may_wait_are_told_to_come_back() -> None:
    async def work() -> list[int]:
        slow = step_times(prefill=(0.05, 0.0, 0.0))
        settings = {"max_waiting": 1}
        async with behind_gateway(options(step_times=slow), gateway=settings, group={"in_flight": 1}) as (gateway, _):
            three = (call(gateway.server.address, "/v1/completions", asked(10, stream=True)) for _ in range(3))
            return sorted(status for status, _ in await asyncio.gather(*three))

    assert run(work()) == [200, 200, 429]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_order_survives_into_an_engine_that_orders_by_priority(engine: str) -> None:
    """Shortest first among those in the gateway; three are in the engine at a time."""

    async def work() -> list[int]:
        slow = step_times(prefill=(0.0, 1e-3, 0.0))
        group = {"in_flight": 3, "control": "gateway+priority"}
        async with behind_gateway(options(engine=engine, step_times=slow), group=group, **strategies("sjf")) as (
            gateway,
            [worker],
        ):
            seen: list[int] = []
            async with asyncio.TaskGroup() as tasks:
                for number in range(3):
                    tasks.create_task(call(gateway.server.address, "/v1/completions", asked(1000 - number)))
                    await until(lambda number=number: len(worker.gpu.prompts) > number)
                seen += [job.priority for job in worker.gpu.prompts]
                await worker.stop()
            return seen

    priorities = run(work())

    assert priorities == sorted(priorities)
    assert len(set(priorities)) == 3


# -- the fleet changes


def test_an_instance_that_is_added_gets_requests_after_a_good_health_check() -> None:
    async def work() -> tuple[int, str]:
        async with (
            workers(*pair(), options(role="prefill")) as [first, decode, second],
            running_gateway(settings_for(fleet_of([first, decode]))) as gateway,
        ):
            await gateway.reload(settings_for(fleet_of([first, decode, second])))
            await until(lambda: gateway.scheduler.instances["prefill-1"].is_ready)
            await first.stop()
            await until(lambda: not gateway.scheduler.instances["prefill-0"].is_ready)
            status, _ = await call(gateway.server.address, "/v1/completions", asked(10))
            return status, gateway.scheduler.instances["prefill-0"].state

    assert run(work()) == (200, "down")


def test_an_instance_that_is_removed_ends_what_it_has_and_gets_nothing_new() -> None:
    async def work() -> tuple[list[int], list[str], int]:
        slow = step_times(prefill=(0.05, 0.0, 0.0))
        prefill, decode = pair(step_times=slow)
        async with (
            workers(prefill, decode, prefill) as [first, decode_worker, second],
            running_gateway(settings_for(fleet_of([first, decode_worker, second], in_flight=1))) as gateway,
        ):
            requests = [
                asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked(10))) for _ in range(6)
            ]
            await until(lambda: bool(first.requests and second.requests))
            await gateway.reload(settings_for(fleet_of([decode_worker, second], in_flight=1)))
            statuses = [status for status, _ in await asyncio.gather(*requests)]
            await until(lambda: "prefill-0" not in gateway.scheduler.instances)
            return statuses, sorted(gateway.scheduler.instances), first.requests

    statuses, instances, requests = run(work())

    assert statuses == [200] * 6
    assert (instances, requests) == (["decode-0", "prefill-1"], 1)


def test_an_instance_that_is_removed_and_does_not_end_costs_a_retry() -> None:
    async def work() -> tuple[int, int]:
        stuck = options(role="prefill", step_times=step_times(prefill=(100.0, 0.0, 0.0)))
        prefill, decode = pair()
        quick = {"timeouts": {"drain_s": 0.2}}
        async with (
            workers(stuck, decode, prefill) as [first, decode_worker, second],
            running_gateway(settings_for(fleet_of([first, decode_worker, second]), quick)) as gateway,
        ):
            request = asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked(10)))
            await until(lambda: bool(first.requests))
            await gateway.reload(settings_for(fleet_of([decode_worker, second]), quick))
            return (await request)[0], gateway.relay.retries

    assert run(work()) == (200, 1)


@pytest.mark.parametrize(("version", "state"), [("0.33.1", "ready"), ("9.9", "refused"), ("", "refused")])
def test_an_engine_of_an_unknown_version_is_refused_with_the_known_ones(
    version: str, state: str, monkeypatch: Any
) -> None:
    monkeypatch.setitem(emulated_worker.VERSIONS, "vllm", version)

    async def work() -> tuple[str, Any]:
        async with behind_gateway(options()) as (gateway, _):
            body = json.loads((await call(gateway.server.address, "/health"))[1])
            return gateway.scheduler.instances["mixed-0"].state, body["instances"]["mixed-0"]["problem"]

    found, problem = run(work())

    assert found == state
    assert ("known: vLLM 0.12 to 0.33" in problem) == (state == "refused")


def test_a_gateway_that_ends_lets_streams_end_and_takes_nothing_new() -> None:
    async def work() -> tuple[int, int]:
        slow = options(step_times=step_times(decode=(0.01, 0.0, 0.0)))
        async with workers(slow) as running, running_gateway(settings_for(fleet_of(running))) as gateway:
            stream = asyncio.ensure_future(call(gateway.server.address, "/v1/completions", asked(10, 20, stream=True)))
            await until(lambda: bool(running[0].gpu.residents))
            return (await stream)[0], (await stream)[1].count(b"data: ")

    assert run(work()) == (200, 21)
