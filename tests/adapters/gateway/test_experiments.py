"""The gateway takes part in live experiments: a real control plane, emulated engines, blocks of four seconds.

The clock of experiments runs 120 times as fast as the real one; latencies are real, so plans leave time for them.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from command_line import kairos
from dataplane.made_answers import answer, schedule_of
from emulated import MODEL, call, run, until, workers
from gateways import LINEAR, behind_gateway, fleet_of, pair, running_gateway, settings_for
from service.experiments.made_experiments import plan
from serving import served

from kairos.adapters.dataplane.arms import Active
from kairos.adapters.gateway import control, experiments
from kairos.adapters.gateway.gateway import Gateway
from kairos.adapters.http_client import HttpPool
from kairos.scheduler_core.service.experiments.design import Stage, draw_schedule
from kairos.scheduler_core.service.experiments.record import Record, verify

SCALE = 120.0
BLOCK_S = 480.0
KEY = "a key of the fleet"
CHAMPION = {"prefill": "fcfs", "prefill_placement": "late", "decode_placement": "least-requests", "decode": "capped"}
STRATEGIES = {"champion": CHAMPION, "challenger": CHAMPION | {"prefill": "sjf"}}
ASKED = {"model": MODEL, "prompt": "x" * 400, "max_tokens": 2, "stream": True}
GENEROUS: dict[str, Any] = {
    "error_rate_p999": 0.5,
    "decision_budget_us": 1e9,
    "ttft_target_s": 10.0,
    "worst_wait_s": 1e6,
}


def document(store: str) -> dict[str, Any]:
    """The control plane's configuration."""
    group = {"profile": "p"}
    return {
        "profiles": {"p": {"gpu": "H100", "model": MODEL, "step_times": {"linear": LINEAR}}},
        "fleet": {"prefill": [group, group], "decode": [group, group]},
        "slo": {"classes": {"default": {"ttft_s": 5.0, "tpot_s": 1.0}}},
        "strategies": STRATEGIES,
        "active": "champion",
        "service": {"clock_scale": SCALE, "schedule_key": KEY},
        "store": {"url": store},
    }


@asynccontextmanager
async def taking_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> AsyncIterator[tuple[Gateway, httpx.Client, Any]]:
    """A service, its process, and a gateway in front of two pairs that has heard it; requests come all the time."""
    monkeypatch.setattr(control, "PERIOD_S", 0.05)
    monkeypatch.setattr(experiments, "REPORT_S", 0.05)
    store = f"sqlite:///{folder / 'kairos.db'}"
    assert kairos("db", "upgrade", "--url", store).code == 0
    config = folder / "kairos.yaml"
    config.write_text(yaml.safe_dump(document(store)))
    with served(os.environ, config=config) as (url, process), httpx.Client(base_url=url, timeout=20.0) as service:
        told = {"strategies": STRATEGIES, "active": "champion", "service": {"schedule_key": KEY}} | changes
        pairs = [*pair(), *pair()]
        async with behind_gateway(*pairs, gateway={"control_plane": {"url": url}}, **told) as (gateway, _):
            await until(lambda: gateway.player.pulled)
            traffic = asyncio.ensure_future(_traffic(gateway))
            try:
                yield gateway, service, process
            finally:
                traffic.cancel()
                with suppress(asyncio.CancelledError):
                    await traffic


async def _traffic(gateway: Gateway) -> None:
    """More at a time than can start, so that there is something to decide."""
    async with asyncio.TaskGroup() as requests:
        while True:
            for _ in range(6):
                requests.create_task(call(gateway.server.address, "/v1/completions", ASKED))
            await asyncio.sleep(0.12)


async def start(service: httpx.Client, design: str, *, max_hours: float, **lengths: float) -> str:
    """Plan an experiment, give it time for latencies on the fast clock, and start it: its id."""
    asked = {
        "challenger": "challenger",
        "design": design,
        "max_hours": max_hours,
        "stages": [{"share": 0.5}],
        "seed": 7,
    }
    asked |= {"drain_s": 10, "sigma": 0.1, "requests_per_pair": 100, "load_bounds": [1.0, 2.0, 3.0]}
    while True:  # until there is a history
        planned = await asyncio.to_thread(service.post, "/experiments/plan", json=asked)
        if planned.status_code == 200:
            break
        assert "history" in planned.json()["detail"], planned.text
        await asyncio.sleep(0.1)
    plan = planned.json()["plan"]
    plan["lengths"] |= {"block_s": BLOCK_S, "burn_s": BLOCK_S / 5, "tail_s": 5.0, "settle_s": 300.0} | lengths
    plan["limits"] = GENEROUS
    started = await asyncio.to_thread(service.post, "/experiments", json={"plan": plan})
    assert started.status_code == 200, started.text
    return str(started.json()["id"])


async def ended(service: httpx.Client, experiment: str) -> Record:
    """The record of an experiment, once it has ended."""
    while True:
        told = await asyncio.to_thread(service.get, f"/experiments/{experiment}")
        record = msgspec.json.decode(told.content, type=Record)
        if record.stopped_at is not None:
            return record
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("design", ["switchback", "pools", "sticky"])
def test_an_experiment_runs_block_by_block_to_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, design: str
) -> None:
    async def work() -> tuple[Record, set[tuple[str, ...]], list[str], str]:
        async with taking_part(tmp_path, monkeypatch) as (gateway, service, _):
            experiment = await start(service, design, max_hours=4 * BLOCK_S / 3600)
            seen: set[tuple[str, ...]] = set()
            judged = asyncio.ensure_future(ended(service, experiment))
            while not judged.done():
                seen.add(tuple(decider.strategy.name for decider in gateway.scheduler.deciders))
                await asyncio.sleep(0.02)
            text = (await call(gateway.server.address, "/metrics"))[1].decode()
            await until(lambda: not gateway.player.experiment)
            last = [decider.strategy.name for decider in gateway.scheduler.deciders]
            return judged.result(), seen, last, text

    record, seen, last, text = run(work(), limit_s=120)

    a, b = "champion@1", "challenger@1"
    assert seen >= {"switchback": {(a,), (b,)}, "pools": {(a, b), (b, a)}, "sticky": {(a, b)}}[design]
    assert record.verdict in ("undecided", "no-difference")
    assert record.n.pairs >= 2
    assert record.n.unresolved == 0
    assert all(side.decisions for pair in record.pairs for side in (pair.observed.first, pair.observed.second))
    assert verify(record) is None
    assert last == [a]
    assert 'what="pushed documents"' in text


async def instances_of(gateway: Gateway, session: str = "") -> set[str]:
    """The prefill and the decode instance that a request goes to."""
    headers = ((b"x-kairos-session", session.encode()),) if session else ()
    pool = HttpPool(gateway.server.address)
    try:
        told = await pool.send(b"POST", b"/v1/completions", headers, json.dumps(ASKED).encode())
        await told.body()
        return {told.header(b"x-kairos-%s-instance" % role).decode() for role in (b"prefill", b"decode")}
    finally:
        pool.close()


def sticky_now(share: float) -> Active:
    """An experiment that has just begun."""
    began_s = time.time() - 10.0
    of = plan("sticky", stages=(Stage(share, None),))
    return answer(draw_schedule(of, 3, began_s, began_s), "sticky", key=KEY.encode())


def test_a_session_keeps_its_arm_and_the_arms_instances_on_every_gateway_and_after_a_restart() -> None:
    names = [f"session {n}" for n in range(100)]

    async def work() -> list[list[set[str]]]:
        went = []
        async with workers(*(each for _ in range(4) for each in pair())) as running:
            settings = settings_for(fleet_of(running), service={"schedule_key": KEY})
            for _ in range(2):
                async with running_gateway(settings) as gateway:
                    gateway._take(sticky_now(0.25))
                    first = [await instances_of(gateway, name) for name in names]
                    again = [await instances_of(gateway, name) for name in names]
                    went += [first, again, [await instances_of(gateway) for _ in names]]
        return went

    told = run(work())
    arms = [["prefill-3" in each for each in went] for went in told]

    assert arms[0] == arms[1] == arms[3] == arms[4]
    assert all(sum(drawn) == pytest.approx(25, abs=15) for drawn in arms)
    assert all(("prefill-3" in each) == ("decode-3" in each) for went in told for each in went)


@pytest.mark.parametrize(("share", "parts"), [(0.5, 2), (0.25, 1)])
def test_the_champion_decides_alone_where_an_arm_can_have_no_instances_of_its_own(share: float, parts: int) -> None:
    async def work() -> int:
        async with behind_gateway(*pair(), *pair(), service={"schedule_key": KEY}) as (gateway, _):
            gateway._take(sticky_now(share))
            return len(gateway.scheduler.deciders)

    assert run(work()) == parts


def test_a_strategy_whose_decisions_fail_is_stopped_by_a_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> Record:
        late = {"guards": {"decision_budget_s": 1e-9}}
        async with taking_part(tmp_path, monkeypatch, **late) as (_, service, _):
            return await ended(service, await start(service, "switchback", max_hours=1.0))

    record = run(work(), limit_s=120)

    assert record.verdict == "stopped-by-guard"
    assert "fallback" in record.sentence


def test_without_its_control_plane_for_a_block_the_champion_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> tuple[list[str], str]:
        async with taking_part(tmp_path, monkeypatch) as (gateway, service, process):
            await start(service, "switchback", max_hours=10.0)
            await until(lambda: gateway.scheduler.decider.strategy.name == "challenger@1")
            process.kill()
            await until(lambda: not gateway.player.experiment)
            gateway.player.turn()
            return [decider.strategy.name for decider in gateway.scheduler.deciders], gateway.player.experiment

    assert run(work(), limit_s=120) == (["champion@1"], "")


def test_a_schedule_that_cannot_be_checked_leaves_the_champion_alone() -> None:
    async def work() -> tuple[list[str], str, int]:
        async with behind_gateway(*pair()) as (gateway, _):
            gateway.player.hear(answer(schedule_of()))
            names = [decider.strategy.name for decider in gateway.scheduler.deciders]
            return names, gateway.player.experiment, gateway.player.refused

    assert run(work()) == (["s1@4"], "", 1)


def test_a_policy_from_anywhere_is_not_imported() -> None:
    async def work() -> tuple[str, int]:
        async with behind_gateway(*pair()) as (gateway, _):
            told = msgspec.to_builtins(answer())
            told["policies"]["prefill"]["name"] = "os:system"
            gateway.player.hear(msgspec.convert(told, type(answer())))
            return gateway.scheduler.decider.strategy.name, gateway.player.refused

    assert run(work()) == ("kairos", 1)
