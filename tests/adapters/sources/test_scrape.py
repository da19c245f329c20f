"""Engines are asked over HTTP, and what they say reaches the database of a service that runs."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
from command_line import kairos
from made_engines import engine, forward_pass, hanging, loads_text, sglang_text, vllm_text
from serving import CONFIG, served
from sqlalchemy import select

from kairos.adapters.sources import push as push_module
from kairos.adapters.sources import scrape as scrape_module
from kairos.adapters.sources.push import Push
from kairos.adapters.sources.scrape import Scraper, Target, live_groups, targets_of
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.service.store.queries.telemetry import read_steps
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import InstanceSample
from kairos.scheduler_core.telemetry import SampleRow


def asked(*urls: tuple[str, Any]) -> tuple[dict[str, SampleRow], dict[str, str]]:
    """Samples and problems of engines asked once."""
    scraper = Scraper()
    targets = [Target(f"decode-{n}", name, url) for n, (url, name) in enumerate(urls)]
    samples = {sample.instance: sample for sample in scraper.samples(targets)}
    scraper.close()
    return samples, scraper.problems


def test_one_engine_that_hangs_and_one_that_is_away_do_not_keep_others_from_being_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scrape_module, "TIMEOUT_S", 0.3)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with hanging() as page, engine({"/metrics": page}) as hangs, engine({"/metrics": vllm_text()}) as well:
            samples, problems = asked((hangs, "vllm"), (away, "vllm"), (well, "vllm"))

    assert list(samples) == ["decode-2"]
    assert "timed out" in problems["decode-0"]
    assert "refused" in problems["decode-1"]


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (b"\x00\xff\xfe garbage", "no Prometheus text"),
        (sglang_text(), "no series of this engine"),
        (b"x" * 2000, "longer than 1000 bytes"),
    ],
)
def test_an_engine_that_answers_garbage_is_said(page: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if says.startswith("longer"):
        monkeypatch.setattr(scrape_module, "LARGEST_ANSWER_BYTES", 1000)
    with engine({"/metrics": page}) as url:
        samples, problems = asked((url, "vllm"))

    assert samples == {}
    assert says in problems["decode-0"]


@pytest.mark.parametrize(
    ("pages", "usage", "waiting"),
    [
        ({"/metrics": sglang_text(), "/v1/loads": loads_text(1, 1, 1)}, 0.5, 1),
        ({"/v1/loads": loads_text(1, 1, 1)}, 0.5, 1),
        ({"/metrics": sglang_text()}, 0.5, 2),
    ],
)
def test_sglang_is_asked_both_ways_and_one_is_enough(pages: dict[str, Any], usage: float, waiting: int) -> None:
    with engine(pages) as url:
        samples, problems = asked((url, "sglang"))

    assert problems == {}
    assert (samples["decode-0"].kv_cache_usage, samples["decode-0"].requests_waiting) == (usage, waiting)


def test_an_engine_that_was_away_and_is_back_is_told_from_its_last_answer() -> None:
    pages: dict[str, Any] = {"/metrics": vllm_text(generated=5.0)}
    scraper = Scraper()
    with engine(pages) as url:
        target = [Target("decode-0", "vllm", url)]
        scraper.samples(target)
        pages["/metrics"] = b"warming up {"
        nothing = scraper.samples(target)
        problem = dict(scraper.problems)
        pages["/metrics"] = vllm_text(generated=9.0)
        (back,) = scraper.samples(target)
    scraper.close()

    assert (nothing, list(problem), scraper.problems) == ([], ["decode-0"], {})
    assert back.output_tokens == 4


# -- the fleet -------------------------------------------------------------------------------------------------------


def live(tmp_path: Path, decode: str, prefill: str = "") -> Path:
    """A configuration with two prefill instances and one decode instance, at these addresses."""
    path = tmp_path / "live.yaml"
    path.write_text(f"""
profiles: {{h100: {{gpu: H100, model: acme/llama-8b, engine: vllm}}}}
fleet:
  prefill: [{{profile: h100}}, {{profile: h100{prefill}}}]
  decode: [{{profile: h100{decode}}}]
""")
    return path


def test_instances_are_named_as_everywhere_and_a_name_stands_for_every_address(tmp_path: Path) -> None:
    path = live(tmp_path, ", url: 'dns+http://localhost:8000', engine: sglang", ", url: 'http://p:1', engine: vllm")
    targets = list(targets_of(live_groups(load_settings(path, {}))))

    assert targets[0] == Target("prefill-1", "vllm", "http://p:1")
    assert Target("decode-0@127.0.0.1", "sglang", "http://127.0.0.1:8000") in targets


def test_a_fleet_without_addresses_cannot_be_asked(tmp_path: Path) -> None:
    ended = kairos("telemetry", "scrape", "--config", live(tmp_path, ""), "--to", "http://127.0.0.1:1")

    assert (ended.code, "no group of the fleet has url and engine" in ended.stderr) == (2, True)


# -- to the control plane --------------------------------------------------------------------------------------------


def sample(n: int = 0) -> SampleRow:
    return SampleRow(instance=f"decode-{n}", at_s=1.7e9)


class Plane:
    """A control plane that answers as told, and keeps what it was sent."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.batches: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.batches.append(request.headers["x-kairos-batch-id"])
        status = self.statuses.pop(0) if self.statuses else 200
        rows = len(json.loads(request.content))
        return httpx.Response(status, json={"stored": rows, "rejected": 0}, headers={"retry-after": "0"})


def pushing(plane: Any, monkeypatch: pytest.MonkeyPatch) -> Push:
    push = Push("http://kairos", "a-key")
    monkeypatch.setattr(push, "_client", httpx.Client(base_url="http://kairos", transport=httpx.MockTransport(plane)))
    return push


def test_a_batch_that_was_not_taken_is_sent_again_under_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane(503, 429)
    push = pushing(plane, monkeypatch)
    push.add("samples", [sample()])
    states = []
    for _ in range(3):
        push.flush()
        states.append((push.waiting_rows, push.problem))

    assert states == [(1, "answers 503"), (1, "answers 429"), (0, "")]
    assert (len(plane.batches), len(set(plane.batches)), push.counts["stored"]) == (3, 1, 1)


def test_a_batch_that_would_be_refused_again_is_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    push = pushing(Plane(422), monkeypatch)
    push.add("samples", [sample()])
    push.add("samples", [sample(), sample(1)])
    push.flush()

    assert (+push.counts, push.waiting_rows) == ({"rejected": 1, "stored": 2}, 0)


def test_what_waits_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_module, "KEPT_ROWS", 5)
    push = pushing(Plane(), monkeypatch)
    for n in range(4):
        push.add("samples", [sample(n)] * 2)
    push.flush()

    assert +push.counts == {"dropped": 4, "stored": 4}


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_ends_it(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    push = pushing(Plane(status), monkeypatch)
    push.add("samples", [sample()])

    with pytest.raises(ConfigError, match=f"answers {status}; set KAIROS_API_KEY"):
        push.flush()


def test_what_answers_is_not_kairos(monkeypatch: pytest.MonkeyPatch) -> None:
    push = pushing(lambda request: httpx.Response(200, text="hello"), monkeypatch)
    push.add("samples", [sample()])
    push.flush()

    assert (push.problem, push.waiting_rows) == ("answers what Kairos would not; check its address", 1)


def test_from_engines_that_run_into_the_database_of_a_service_that_runs(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kairos.db"
    publisher = zmq.Context.instance().socket(zmq.XPUB)
    publisher.bind(f"ipc://{tmp_path}/fpm")
    generated = iter(range(100, 10**6, 50))
    pages: dict[str, Any] = {"/metrics": lambda: vllm_text(generated=float(next(generated)))}
    with served({"KAIROS_STORE__URL": url, "PATH": "/usr/bin:/bin"}) as (address, _), engine(pages) as decode:
        path = live(tmp_path, f", url: '{decode}', engine: vllm, forward_pass: 'ipc://{tmp_path}/fpm'")
        command = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", "telemetry", "scrape"]
        options = ["--config", str(path), "--to", address, "--every", "0.05", "--json"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert publisher.recv() == b"\x01"
        for number in range(50):
            publisher.send_multipart(forward_pass(number, 0.01, num_decode_requests=4, sum_decode_kv_tokens=900))
        store = Store(url)
        while sum(map(len, read_steps(store)[0])) < 50 or len(samples := stored_samples(store)) < 3:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        told = json.loads(process.communicate(timeout=20)[0])
        steps = read_steps(store)[0][0]
        store.close()
    publisher.close(0)

    assert (process.returncode, told["stored"] >= 53) == (0, True)
    assert (len(steps), steps.profile.gpu, set(steps.step_s)) == (50, "H100", {0.01})
    assert {row.instance for row in samples} == {"decode-0"}
    assert [row.output_tokens for row in samples[:3]] == [None, 50, 50]


def stored_samples(store: Store) -> list[Any]:
    with store.read() as connection:
        return list(connection.execute(select(InstanceSample.__table__).order_by(InstanceSample.id)))


def test_a_control_plane_that_is_away_is_said_once_and_what_was_not_delivered_is_counted(tmp_path: Path) -> None:
    with engine({"/metrics": vllm_text()}) as decode, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        path = live(tmp_path, f", url: '{decode}', engine: vllm")
        to = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        ended = kairos(*("telemetry", "scrape", "--config", path, "--to", to, "--every", 0.01, "--rounds", 3, "--json"))

    assert (ended.code, json.loads(ended.stdout)) == (0, {"undelivered": 3})
    assert ended.stderr.count("control plane: does not answer") == 1


def test_an_address_of_the_control_plane_that_cannot_be_is_said() -> None:
    ended = kairos("telemetry", "scrape", "--config", CONFIG, "--to", "kairos:8011")

    assert (ended.code, ended.stderr) == (
        2, "kairos: the control plane's address is 'kairos:8011'; give http://HOST:PORT\n",
    )  # fmt: skip
