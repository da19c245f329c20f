"""The engine's side of the control plane: the real service takes its steps, a page of answers stands for the rest."""

import gzip
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served

from kairos.adapters import control_plane as module
from kairos.adapters.control_plane import ControlPlane, NewStepTimes, NewStrategy
from kairos.predictors.artifact import ProfileModels, dump
from kairos.predictors.step_model import model_of_line
from kairos.scheduler_core.domain import Line, Profile
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.telemetry import RequestRow, StepRecord

PROFILE = Profile("H100", "m", engine="vllm")
DECODE = StepRecord("decode", 0.0125, batch_size=4, sum_context_tokens=4000, prev_phase="decode", run="run")
PREFILL = StepRecord("prefill", 0.2, n_requests=1, new_tokens=2048, run="run")


class Page:
    """A control plane whose answers a test sets, by method and path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.headers: dict[str, str] = {}
        self.batches: list[tuple[str, list[dict[str, Any]]]] = []
        self.asked: list[tuple[str, str | None]] = []
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.asked.append((self.path, self.headers["authorization"]))
                self.answer(*page.answers.get(self.path, (404, b"")))

            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["content-length"])))
                rows = [json.loads(line) for line in body.splitlines()]
                page.batches.append((self.headers["x-kairos-batch-id"], rows))
                self.answer(*page.answers.get(self.path, (200, b"{}")))

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                for name, value in page.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def says(self, path: str, told: Any, status: int = 200) -> None:
        self.answers[path] = status, told if isinstance(told, bytes) else json.dumps(told).encode()


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    yield page
    page.server.shutdown()
    page.server.server_close()


def plane(page: Page, key: str = "") -> ControlPlane:
    return ControlPlane(page.url, PROFILE, "run", key)


def strategy(text: str, name: str = "theirs", generation: int = 1) -> dict[str, Any]:
    return {"name": name, "version": 3, "generation": generation, "policies": {}, "text": text}


def test_an_answer_of_a_replica_that_is_behind_changes_nothing(page: Page) -> None:
    speaks = plane(page)
    for generation, rule in ((4, "edf"), (3, "sjf"), (5, "lars")):
        page.says("/strategies/active", strategy(f"{rule}+late+headroom+capped", generation=generation))
        speaks.exchange()

    assert [news.strategy.prefill.name for news in speaks.news if isinstance(news, NewStrategy)] == ["edf", "lars"]


def serving(version: int = 7, profile: Profile = PROFILE, **more: str) -> dict[str, Any]:
    """The answer of the service; some say the schema, too."""
    entry = {"id": "m", "profile_id": profile.profile_id, "version": version, "age_s": 3.5, "corrections": {}}
    return {"models": [entry | more], "troubles": []}


def artifact() -> bytes:
    lines = {"prefill": Line(0.01, 1e-4, 0.0), "decode": Line(0.02, 1e-3, 0.0)}
    return dump([ProfileModels(PROFILE, {k: model_of_line(k, line, "made up") for k, line in lines.items()}, {})])


def test_steps_reach_the_store_of_the_service_once(tmp_path: Path) -> None:
    database = tmp_path / "kairos.db"
    with served(os.environ | {"KAIROS_STORE__URL": f"sqlite:///{database}"}) as (address, _):
        speaks = ControlPlane(address, PROFILE, "run")
        for step in (DECODE, PREFILL, DECODE):
            speaks.note(step)
        speaks.exchange()
        again = ControlPlane(address, PROFILE, "run")
        for step in (DECODE, PREFILL, DECODE):
            again.note(step)
        again.exchange()  # the same batch: its answer had not come through

    with sqlite3.connect(database) as connection:
        stored = connection.execute("select new_tokens, batch_size from steps order by new_tokens").fetchall()
    assert stored == [(0, 4), (0, 4), (2048, 0)]
    assert speaks.counts["pushed steps"] == again.counts["pushed steps"] == 3


def test_a_strategy_that_is_activated_in_the_service_is_news(tmp_path: Path) -> None:
    policies = {
        "prefill": {"name": "edf", "preempt": True},
        "prefill_placement": "late",
        "decode_placement": "headroom",
    }
    with served(os.environ | {"KAIROS_STORE__URL": f"sqlite:///{tmp_path}/kairos.db"}) as (address, _):
        speaks = ControlPlane(address, PROFILE, "run")
        speaks.exchange()
        httpx.put(f"{address}/strategies/mine", json=policies | {"decode": "capped"}).raise_for_status()
        httpx.put(f"{address}/strategies/active", json={"name": "mine"}).raise_for_status()
        speaks.exchange()
        speaks.exchange()

    first, then = speaks.news
    assert isinstance(first, NewStrategy)
    assert isinstance(then, NewStrategy)
    assert (first.name, then.name) == ("kairos", "mine")
    assert (then.strategy.prefill.name, then.strategy.decode.name) == ("edf", "capped")


def test_a_service_that_is_away_costs_nothing_but_a_count() -> None:
    speaks = ControlPlane("http://127.0.0.1:9", PROFILE, "run")
    speaks.note(DECODE)

    speaks.exchange()

    assert speaks.counts["failed exchanges"] == 1
    assert speaks.reached_s is None
    assert not speaks.news


def test_steps_wait_for_a_service_that_fails_and_go_under_the_same_name(page: Page) -> None:
    page.says("/telemetry/steps", b"", 503)
    speaks = plane(page)
    speaks.note(DECODE)
    speaks.exchange()
    speaks.note(PREFILL)
    page.says("/telemetry/steps", {})

    speaks.exchange()

    names = [name for name, _ in page.batches]
    assert names == ["run/1", "run/1", "run/2"]
    assert page.batches[0] == page.batches[1]
    assert speaks.counts["pushed steps"] == 2


def test_a_service_that_is_full_is_left_alone_for_as_long_as_it_says(page: Page) -> None:
    page.headers = {"retry-after": "30"}
    page.says("/telemetry/steps", b"", 429)
    speaks = plane(page)
    speaks.note(DECODE)

    speaks.exchange()
    speaks.exchange()

    assert len(page.batches) == 1
    assert speaks.counts["pushed steps"] == speaks.counts["refused steps"] == 0


@pytest.mark.parametrize("status", [404, 409, 422])
def test_steps_that_are_refused_are_counted_and_not_sent_again(page: Page, status: int) -> None:
    page.says("/telemetry/steps", b"", status)
    speaks = plane(page)
    speaks.note(DECODE)

    speaks.exchange()
    speaks.exchange()

    assert len(page.batches) == 1
    assert speaks.counts["refused steps"] == 1


def test_the_oldest_steps_are_dropped_and_counted_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_STEPS", 3)
    speaks = ControlPlane("http://127.0.0.1:9", PROFILE, "run")

    for _ in range(5):
        speaks.note(DECODE)

    assert speaks.counts["dropped steps"] == 2


def test_requests_that_have_ended_go_to_a_path_of_their_own(page: Page) -> None:
    speaks = plane(page)
    speaks.note(DECODE)
    speaks.note_request(RequestRow(10, 0.0, 0.0, 1, 0, 10, 0, ttft_ms=5.0))

    speaks.exchange()

    assert speaks.counts["pushed steps"] == speaks.counts["pushed requests"] == 1
    assert [rows[0].get("input_tokens") for _, rows in page.batches] == [None, 10]
    assert len({batch for batch, _ in page.batches}) == 2


def test_the_active_strategy_is_news_once(page: Page) -> None:
    page.says("/strategies/active", strategy("edf(preempt=true)+late+headroom+capped"))
    speaks = plane(page)

    speaks.exchange()
    speaks.exchange()

    (news,) = speaks.news
    assert isinstance(news, NewStrategy)
    assert (news.name, news.strategy.prefill.name, news.strategy.decode.name) == ("theirs", "edf", "capped")


@pytest.mark.parametrize(
    "text",
    ["nonsense", "edf+late+headroom+unheard-of", "edf(h=1)+late+headroom+slack", "os:Policy+late+headroom+slack"],
)
def test_a_strategy_that_cannot_be_used_is_refused_once_and_steps_go_on(page: Page, text: str) -> None:
    page.says("/strategies/active", strategy(text))
    speaks = plane(page)
    speaks.note(DECODE)

    speaks.exchange()
    speaks.exchange()

    assert not speaks.news
    assert speaks.counts["refused exchanges"] == 1
    assert speaks.counts["pushed steps"] == 1


def test_the_model_of_the_profile_is_fetched_once_for_each_version(page: Page) -> None:
    page.says("/models/serving", serving(7))
    path = f"/models/{PROFILE.profile_id}/7/artifact"
    page.says(path, artifact())
    speaks = plane(page)

    speaks.exchange()
    speaks.exchange()

    (news,) = speaks.news
    assert isinstance(news, NewStepTimes)
    assert news.version == "7"
    assert news.step_times.decode_step_s(10, 0) == pytest.approx(0.03)
    assert [asked for asked, _ in page.asked].count(path) == 1


def test_a_model_of_another_schema_is_refused_without_fetching_it(page: Page) -> None:
    page.says("/models/serving", serving(schema_hash="of old"))
    speaks = plane(page)

    speaks.exchange()

    assert speaks.counts["refused exchanges"] == 1
    assert not any("artifact" in path for path, _ in page.asked)


def test_a_damaged_model_is_refused_and_what_is_in_force_stays(page: Page) -> None:
    page.says("/models/serving", serving(7))
    page.says(f"/models/{PROFILE.profile_id}/7/artifact", artifact()[:-9])
    speaks = plane(page)

    speaks.exchange()

    assert not speaks.news
    assert speaks.counts["refused exchanges"] == 1


def test_models_of_other_profiles_are_left_alone(page: Page) -> None:
    page.says("/models/serving", serving(profile=Profile("B300", "m")))
    speaks = plane(page)

    speaks.exchange()

    assert not speaks.news


def test_answers_that_are_no_json_are_a_failure_that_is_tried_again(page: Page) -> None:
    page.says("/strategies/active", b"<html>")
    speaks = plane(page)

    speaks.exchange()
    speaks.exchange()

    assert speaks.counts["failed exchanges"] == 2


def test_the_key_goes_with_every_request(page: Page) -> None:
    plane(page, "secret").exchange()

    assert {key for _, key in page.asked} == {"Bearer secret"}


def test_an_address_that_is_none_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="write http://"):
        ControlPlane("localhost:8011", PROFILE, "run")
