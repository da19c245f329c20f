"""`kairos demo` from end to end on a small trace, and the README that shows it."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from command_line import kairos_apart
from test_docs import ROOT, blocks

from kairos.adapters.cli.demo_replay import MOST_OUTPUT_TOKENS, MOST_REQUESTS, demo_data, limit_s_of
from kairos.adapters.traces import Trace, read_trace, write_trace
from kairos.adapters.traces.generate import generate
from kairos.adapters.traces.synthetic_telemetry import write_telemetry
from kairos.scheduler_core.config import Settings


@dataclass(frozen=True)
class Shown:
    """What a demo printed, as text and with --json, and where it wrote."""

    text: str
    json: str
    out: Path


def with_data(folder: Path) -> None:
    """A small trace and telemetry for the demo to take."""
    (folder / "data" / "traces").mkdir(parents=True)
    write_trace(generate("mooncake_conversation", 90, seed=1), folder / "data" / "traces" / "some.csv.gz")
    write_telemetry(folder / "data" / "telemetry", seed=1)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    with_data(folder)
    text, as_json = (
        kairos_apart("demo", "--out", "demo-out", "--seconds", "4", *option, cwd=folder, KAIROS_DATA="data")
        for option in ((), ("--json",))
    )
    return Shown(text, as_json, folder / "demo-out")


def skeleton(text: str) -> list[list[str]]:
    """The words of the demo's output, line by line, but names of files and words that hang on the numbers."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"^(- \w+) .*", r"\1", line)  # a verdict
        line = re.sub(r"predicted TTFT .*", "predicted TTFT", line)
        line = re.sub(r"^(\d\. (?:Compare|Emulate) [^/]*?)\S*/\S*.*", r"\1", line)  # what of which file is replayed
        line = re.sub(r"^\S+( \(SYNTHETIC\))?, target", "TRACE, target", line)
        line = re.sub(r" \([^)]*\)|\S*/\S*", "", line)
        words = re.findall(r"[A-Za-z][A-Za-z_-]*", line)
        if words and "mixed" not in words:
            lines.append(words)
    return lines


def ports(configuration: Path) -> list[int]:
    """Those of everything that the live part of a demo starts."""
    settings = Settings.model_validate(yaml.safe_load(configuration.read_text()))
    urls = [group.url for _, _, group in settings.fleet.groups() if group.url]
    return [settings.service.port, settings.gateway.port, *(urlsplit(url).port or 0 for url in urls)]


def listens(port: int) -> bool:
    """Whether somebody answers there."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def test_the_readme_shows_what_the_demo_prints(shown: Shown) -> None:
    command, _, in_readme = blocks(ROOT / "README.md", "text")[0].partition("\n")

    assert command == "$ make demo"
    assert skeleton(in_readme) == skeleton(shown.text)


def test_the_demo_leaves_a_report_and_a_configuration_that_other_commands_take(shown: Shown) -> None:
    bound = kairos_apart("bound", "data/traces/some.csv.gz", "--fleet", "demo-out/kairos.yaml", cwd=shown.out.parent)
    report = (shown.out / "report.html").read_text()

    assert "<svg" in report
    assert "some, live" in report
    assert "can meet their TTFT target" in bound


def test_with_json_the_same_figures_and_decisions_are_in_the_one_thing_printed(shown: Shown) -> None:
    answer = json.loads(shown.json)
    asked = {request["request_id"] for request in answer["schedule"]["snapshot"]["waiting"]}
    *compared, before, after = json.loads((shown.out / "results.json").read_text())["cells"]

    assert {row["request_id"] for row in answer["schedule"]["answer"]["prefill"]} == asked
    assert [cell["metrics"] for cell in answer["cells"]] == [cell["metrics"] for cell in compared]
    assert (len(answer["cells"]), answer["synthetic"]) == (12, False)
    assert [cell["strategy"] for cell in (before, after)] == ["engine-default", "kairos"]
    assert all((shown.out.parent / path).exists() for path in answer["files"].values())


def test_the_store_has_every_request_that_was_sent_and_first_tokens_no_later_than_clients_saw_them(
    shown: Shown,
) -> None:
    live = json.loads(shown.json)["live"]

    assert list(live) == ["engine-default@1", "kairos@1"]
    for name, row in live.items():
        strategy = name.partition("@")[0]
        seen = list(csv.DictReader((shown.out / f"live-{strategy}" / "requests.csv").open()))
        assert row["requests"] == len(seen)
        assert row["ttft_attainment"] * len(seen) >= sum(r["ttft_met"] == "true" for r in seen) - 1e-9


def test_the_model_that_was_trained_from_the_workers_telemetry_predicts_them(shown: Shown) -> None:
    errors = json.loads(shown.json)["errors"]

    assert set(errors) == {"prefill", "decode"}
    for row in errors.values():
        assert row["learned"] < 0.02 < row["prior"]


def test_nothing_is_left_running(shown: Shown) -> None:
    log = (shown.out / "serve.log").read_text()

    assert '"the service ends"' in log
    assert [port for port in ports(shown.out / "live.yaml") if listens(port)] == []


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """Programs that are started heed SIGINT, also where the tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_everything_that_the_demo_has_started(tmp_path: Path) -> None:
    with_data(tmp_path)
    command = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", "demo", "--out", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"KAIROS_DATA": "data"}, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        while not next(demo.stdout).startswith("   sent"):
            pass
        began = ports(tmp_path / "out" / "live.yaml")
        running = [listens(port) for port in began]
        demo.send_signal(signal.SIGINT)
        code = demo.wait(timeout=60)

    assert all(running)
    assert code == 130
    assert [port for port in began if listens(port)] == []


@pytest.mark.parametrize("named", [None, "no-such-folder"])
def test_without_real_data_it_is_drawn_and_said_to_be_synthetic(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAIROS_DATA", raising=False)
    if named is not None:
        monkeypatch.setenv("KAIROS_DATA", named)

    data = demo_data(tmp_path)

    assert data.synthetic
    assert read_trace(data.trace).synthetic
    assert "SYNTHETIC" in capsys.readouterr().err


def test_a_long_trace_is_cut_where_the_demo_would_take_too_long() -> None:
    def limit_s(count: int, output_tokens: int) -> float | None:
        lengths = np.full(count, output_tokens)
        return limit_s_of(Trace("made-up", np.arange(count, dtype=np.float64), lengths, lengths))

    assert limit_s(MOST_REQUESTS, 1) is None
    assert limit_s(MOST_REQUESTS + 1, 1) == MOST_REQUESTS
    assert limit_s(1000, MOST_OUTPUT_TOKENS // 100) == 99
