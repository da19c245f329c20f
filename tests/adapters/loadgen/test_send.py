"""A workload sent through the gateway to emulated engines, and to endpoints that misbehave."""

import asyncio
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emulated import MODEL, run, until, workers
from emulated import options as worker
from gateways import behind_gateway, pair, settings_for
from simulations import workload

from kairos.adapters.asgi import Receive, Scope, Send, answer
from kairos.adapters.asgi_server import AsgiServer
from kairos.adapters.emulator.faults import Fault
from kairos.adapters.loadgen import Endpoint, LiveRun, send_all, write_live_run
from kairos.adapters.simulator.evidence import Meta
from kairos.adapters.simulator.log import REQUEST_COLUMNS
from kairos.adapters.simulator.scenario import Scenario, workload_of
from kairos.adapters.simulator.tables import STATUSES, Workload

SENT = workload([5.0, 5.05, 5.05, 5.3], [40, 800, 17, 3], [3, 5, 1, 8], ttft_target_s=[5.0, 5.0, 5.0, 1e-6])


def statuses(result: LiveRun) -> list[str]:
    return [STATUSES[code] for code in result.requests.status]


async def through_the_gateway(requests: Workload = SENT, **group: object) -> LiveRun:
    async with behind_gateway(*pair(), group=group or None) as (gateway, _):
        return await send_all(requests, Endpoint(gateway.server.address, MODEL))


def test_every_request_is_sent_when_it_is_due_and_what_became_of_it_is_noted() -> None:
    ended: list[int] = []

    async def story() -> LiveRun:
        async with behind_gateway(*pair()) as (gateway, _):
            return await send_all(SENT, Endpoint(gateway.server.address, MODEL), ended.append)

    result = run(story())
    table = result.requests

    assert ended == [1, 2, 3, 4]
    assert statuses(result) == ["finished"] * 4
    assert (table.first_token_s > SENT.arrival_s).all()
    assert (table.prefill_start_s >= SENT.arrival_s).all()
    assert (table.prefill_start_s < table.first_token_s).all()
    assert (table.last_token_s >= table.first_token_s).all()
    assert table.ttft_met.tolist() == [True, True, True, False]
    assert np.isnan(table.tpot_s).tolist() == [False, False, True, False], "one token has no pace"
    assert set(table.prefill_instance) == set(table.decode_instance) == {0}
    assert (result.lag_s >= 0).all()
    assert len(result.gaps.itl_s) == sum(SENT.output_tokens - 1)
    assert len(result.decision_us) == 4


def test_the_engine_gets_exactly_the_lengths_and_prefixes_of_the_trace() -> None:
    ids = [(1, 2, 3), (1, 2, 4)]
    sent = replace(workload([0.0, 0.3], [48, 48], [2, 2]), block_ids=ids, block_tokens=16)

    async def story() -> LiveRun:
        async with workers(worker(prefix_cache=True)) as (engine,):
            return await send_all(sent, Endpoint(engine.address, MODEL))

    result = run(story())

    assert statuses(result) == ["finished"] * 2, "the engine counts as many output tokens as were asked for"
    assert result.requests.cached_tokens.tolist() == [0, 32]


def test_tenants_classes_and_targets_reach_the_gateway() -> None:
    sent = replace(SENT, slo_class=["batch", "default", "unknown", "batch"], tenant=["a", "b", "", "a"])
    seen: list[tuple[str, str, float]] = []

    async def story() -> None:
        slo = {"classes": {"batch": {"ttft_s": 3.0}, "default": {"ttft_s": 1.0}}}
        async with behind_gateway(*pair(), slo=slo) as (gateway, _):
            ended = gateway.app._ended
            gateway.app._ended = lambda call, outcome, code: (
                seen.append((call.slo_class, call.tenant, call.ttft_target_s)),
                ended(call, outcome, code),
            )[1]
            await send_all(sent, Endpoint(gateway.server.address, MODEL, frozenset({"batch", "default"})))

    run(story())

    assert sorted(seen) == [("batch", "a", 3.0), ("batch", "a", 5.0), ("default", "", 5.0), ("default", "b", 5.0)]


def test_a_trace_is_scaled_to_a_fleet_of_mixed_instances_too(tmp_path: Path) -> None:
    settings = settings_for({"mixed": [{"profile": "p"}, {"profile": "p"}]})
    (tmp_path / "kairos.yaml").write_text(settings.model_dump_json(include={"profiles", "fleet"}))
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,1000000,1\n9,1000000,1\n")

    sent = workload_of(Scenario(tmp_path / "trace.csv", str(tmp_path / "kairos.yaml"), load=0.5))

    assert sent.arrival_s.tolist() == pytest.approx([0.0, 2.0]), "two seconds of work for two instances at half load"


def test_a_slow_answer_holds_no_later_request_up() -> None:
    slow_first = workload([0.0, 0.1, 0.2], [300_000, 10, 10], [2, 2, 2])

    async def story() -> LiveRun:
        async with workers(worker(), worker()) as engines:
            return await send_all(slow_first, Endpoint(engines[0].address, MODEL))

    result = run(story())

    assert statuses(result) == ["finished"] * 3
    assert result.requests.last_token_s[0] > 0.3


@pytest.mark.parametrize(
    ("fault", "status"), [(Fault.REFUSE, "rejected"), (Fault.CUT, "failed"), (Fault.SSE_ERROR, "failed")]
)
def test_requests_that_an_engine_fails_are_told_apart_from_those_that_it_refuses(fault: Fault, status: str) -> None:
    async def story() -> LiveRun:
        async with workers(worker(faults={fault: 1.0})) as (engine,):
            return await send_all(SENT, Endpoint(engine.address, MODEL))

    result = run(story())

    assert statuses(result) == [status] * 4
    assert sum(result.problems.values()) == 4
    assert not result.requests.slo_met.any()


def test_where_nobody_listens_every_request_fails() -> None:
    result = run(send_all(SENT, Endpoint("http://127.0.0.1:9", MODEL)))

    assert statuses(result) == ["failed"] * 4
    assert result.problems == {"connect": 4}


def test_an_answer_of_another_length_is_no_finished_request() -> None:
    async def one_token(scope: Scope, receive: Receive, send: Send) -> None:
        event = b'data: {"choices":[{"text":"a"}]}\n\n'
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
        await answer(send, 200, event + usage, b"text/event-stream")

    async def story() -> LiveRun:
        server = AsgiServer(one_token)
        await server.start()
        try:
            return await send_all(SENT, Endpoint(server.address, MODEL))
        finally:
            await server.stop()

    result = run(story())

    assert statuses(result) == ["failed", "failed", "finished", "failed"]
    assert result.problems == {"other length than asked for": 3}


def test_the_files_of_a_live_run_are_those_of_a_simulated_one(tmp_path: Path) -> None:
    result = run(through_the_gateway())

    write_live_run(result, tmp_path, Meta("1", "kairos load", [], {}))
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    metrics = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    lag = json.loads((tmp_path / "lag.json").read_text())

    assert list(rows[0]) == REQUEST_COLUMNS
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert metrics["ttft_attainment"] == 0.75
    assert metrics["worst_wait_s"] < 5.0
    assert 0 <= lag["p50_s"] <= lag["p99_s"] <= lag["max_s"]


def test_nothing_is_left_open_when_a_run_is_given_up() -> None:
    long = workload([0.0, 60.0], [1_000_000, 1])

    async def story() -> None:
        async with workers(worker()) as (engine,):
            sending = asyncio.create_task(send_all(long, Endpoint(engine.address, MODEL)))
            await until(lambda: engine.gpu.waiting + engine.gpu.running > 0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await until(lambda: engine.server.connections + engine.gpu.waiting + engine.gpu.running == 0)

    run(story())
