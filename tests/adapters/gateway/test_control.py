"""The gateway beside a real control plane: telemetry arrives, the strategy changes live, and it may go away."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
from command_line import kairos
from emulated import MODEL, call, options, run, until, workers
from gateways import behind_gateway, fleet_of, pair, running_gateway, settings_for
from serving import served

from kairos.adapters.control_plane import NewStepTimes
from kairos.adapters.gateway import control
from kairos.scheduler_core.domain import Line, LinearStepTimes

ASKED = {"model": MODEL, "prompt": "x" * 40, "max_tokens": 4, "stream": True}


def test_telemetry_goes_out_and_a_strategy_comes_in_while_it_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(control, "PERIOD_S", 0.05)
    store = f"sqlite:///{tmp_path / 'kairos.db'}"
    assert kairos("db", "upgrade", "--url", store).code == 0

    async def work(url: str) -> tuple[str, str, list[int]]:
        async with behind_gateway(*pair(), gateway={"control_plane": {"url": url}}) as (gateway, _):
            await until(lambda: gateway.scheduler.decider.strategy.name == "kairos@1")
            statuses = [(await call(gateway.server.address, "/v1/completions", ASKED))[0] for _ in range(3)]
            put = await asyncio.to_thread(
                httpx.put, f"{url}/strategies/active", json={"name": "tuned"}, headers={"if-match": "*"}
            )
            assert put.is_success, put.text
            await until(lambda: gateway.scheduler.decider.strategy.name.startswith("tuned@"))
            statuses.append((await call(gateway.server.address, "/v1/completions", ASKED))[0])
            await until(lambda: gateway.control is not None and gateway.control.plane.counts["pushed requests"] == 4)
            text = (await call(gateway.server.address, "/metrics"))[1].decode()
            return gateway.scheduler.decider.strategy.prefill.name, text, statuses

    with served(os.environ | {"KAIROS_STORE__URL": store}) as (url, _):
        prefill, text, statuses = run(work(url), limit_s=60)

    assert (prefill, statuses) == ("edf", [200] * 4)
    assert 'kairos_gateway_control_plane_total{what="pushed requests"} 4' in text


def test_without_its_control_plane_the_gateway_goes_on_and_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(control, "PERIOD_S", 0.05)

    async def work() -> tuple[int, str, str]:
        away = {"control_plane": {"url": "http://127.0.0.1:9"}}
        async with behind_gateway(options(), gateway=away) as (gateway, _):
            await until(lambda: gateway.control is not None and gateway.control.plane.counts["failed exchanges"] > 0)
            status, _ = await call(gateway.server.address, "/v1/completions", ASKED)
            text = (await call(gateway.server.address, "/metrics"))[1].decode()
            return status, text, gateway.scheduler.decider.strategy.name

    status, text, strategy = run(work())

    assert (status, strategy) == (200, "kairos")
    assert "kairos_gateway_control_plane_age_seconds inf" in text
    assert 'kairos_gateway_control_plane_total{what="failed exchanges"}' in text


def test_a_model_that_was_pulled_predicts_for_an_instance_that_joins_later_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(control, "PERIOD_S", 0.05)
    away = {"control_plane": {"url": "http://127.0.0.1:9"}}
    times = LinearStepTimes(Line(0.1, 0.0, 0.0), Line(0.1, 0.0, 0.0))

    async def work() -> list[tuple[str, bool]]:
        async with (
            workers(options(), options()) as running,
            running_gateway(settings_for(fleet_of(running[:1]), away)) as gateway,
        ):
            (first,) = gateway.scheduler.instances.values()
            assert gateway.control is not None
            gateway.control.plane.news.append(NewStepTimes(times, "7", first.profile.profile_id))
            await until(lambda: first.model_version == "7")
            await gateway.reload(settings_for(fleet_of(running), away))
            sides = [(i.model_version, i.prefill) for i in gateway.scheduler.instances.values()]
            return [(version, side is not None and side.instance.step_times is times) for version, side in sides]

    assert run(work()) == [("7", True)] * 2
