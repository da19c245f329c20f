"""Real services and their training processes: killed half-way, and two of them on one database."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
from command_line import kairos
from made_telemetry import decode_steps
from service.models.made_life import ID, step_rows
from serving import served
from store.test_service import on

from kairos.predictors.artifact import dump, parse
from kairos.predictors.training import train
from kairos.scheduler_core.service.store.session import Store

T = TypeVar("T")


def eventually(look: Callable[[], T | None]) -> T:
    """What a look finds, as soon as it finds something."""
    until_s = time.monotonic() + 240
    while (found := look()) is None:
        assert time.monotonic() < until_s, "it never came"
        time.sleep(0.02)
    return found


def ask(method: str, url: str, **request: Any) -> Any:
    return httpx.request(method, url, timeout=60, **request).raise_for_status().json()


def training(address: str, number: int, *states: str) -> dict[str, Any]:
    """A training, once it is in one of these states."""

    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = ask("GET", f"{address}/models/trainings/{number}")
        return found if found["state"] in states else None

    return eventually(look)


def serving(address: str) -> list[str]:
    return [model["id"] for model in ask("GET", f"{address}/models/serving")["models"]]


def send_steps(address: str, n: int = 3_000) -> None:
    ask("POST", f"{address}/telemetry/steps", json=[msgspec.to_builtins(row) for row in step_rows(n)])


def upload(address: str) -> str:
    """The id of a model."""
    content = dump(list(train([decode_steps()])))
    headers = {"content-type": "application/octet-stream"}
    return str(ask("POST", f"{address}/models", content=content, headers=headers)["models"][0])


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def at_head(empty: Store, url: str) -> None:
    if not empty.embedded:
        assert kairos("db", "upgrade", "--url", url).code == 0


def test_kill_9_during_a_training_and_a_promotion_leaves_whole_models_and_nothing_undone(
    empty: Store, url: str
) -> None:
    at_head(empty, url)
    with served(on(url)) as (address, process):
        send_steps(address)
        asked = ask("POST", f"{address}/models/train", json={})["id"]
        training(address, asked, "running")
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
    with served(on(url)) as (address, process):
        done = training(address, asked, "done", "failed")
        models = [upload(address) for _ in range(3)]
        for model in models:
            ask("POST", f"{address}/models/{model}/promote", json={})
        process.send_signal(signal.SIGKILL)
    with served(on(url)) as (address, _):
        restored = serving(address)
        made = ask("GET", f"{address}/models")["models"]
        contents = [httpx.get(f"{address}/models/{m['profile_id']}/{m['version']}/artifact").content for m in made]

    assert (done["state"], done["attempts"]) == ("done", 2)
    assert restored == models[-1:]
    assert all(parse(content, "stored").profile_ids == [ID] for content in contents)


def test_a_training_process_that_is_killed_alone_is_followed_by_another(empty: Store, url: str) -> None:
    at_head(empty, url)
    with served(on(url)) as (address, process):
        send_steps(address)
        asked = ask("POST", f"{address}/models/train", json={})["id"]
        training(address, asked, "running")
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        done = training(address, asked, "done", "failed")
        metrics = httpx.get(f"{address}/metrics").text

    assert (done["state"], done["attempts"]) == ("done", 2)
    assert 'kairos_trainings_total{outcome="killed"} 1.0' in metrics


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_of_two_replicas_one_trains_and_both_serve_what_is_promoted(empty: Store, url: str) -> None:
    at_head(empty, url)
    with served(on(url)) as (one, first), served(on(url)) as (other, second):
        send_steps(one)
        asked = ask("POST", f"{other}/models/train", json={})["id"]
        training(one, asked, "running")
        workers = children(first.pid) + children(second.pid)
        done = training(one, asked, "done", "failed")
        ask("POST", f"{one}/models/{done['models'][0]}/promote", json={})
        at_other = eventually(lambda: serving(other) or None)
        at_one = serving(one)

    assert len(workers) == 1
    assert (done["state"], done["attempts"]) == ("done", 1)
    assert at_one == at_other == done["models"]
