"""`kairos demo` from end to end on a small trace, and the README that shows it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from command_line import kairos_apart
from test_docs import ROOT, blocks

from kairos.adapters.cli.demo import MOST_OUTPUT_TOKENS, MOST_REQUESTS, _data, _limit_s
from kairos.adapters.traces import Trace, read_trace, write_trace
from kairos.adapters.traces.generate import generate
from kairos.adapters.traces.synthetic_telemetry import write_telemetry


@dataclass(frozen=True)
class Shown:
    """What a demo printed, as text and with --json, and where it wrote."""

    text: str
    json: str
    out: Path


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data" / "traces").mkdir(parents=True)
    write_trace(generate("mooncake_conversation", 90, seed=1), folder / "data" / "traces" / "some.csv.gz")
    write_telemetry(folder / "data" / "telemetry", seed=1)
    text, as_json = (
        kairos_apart("demo", "--out", "demo-out", *option, cwd=folder, KAIROS_DATA="data")
        for option in ((), ("--json",))
    )
    return Shown(text, as_json, folder / "demo-out")


def skeleton(text: str) -> list[str]:
    """What is left of the demo's output without numbers, names of files, and words that hang on the numbers."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"^(- \w+) .*", r"\1", line)  # a verdict
        line = re.sub(r"predicted TTFT .*", "predicted TTFT", line)
        line = re.sub(r"^(\d\. \w+ \w+ [^/]*?)\S*/\S*.*", r"\1", line)  # a step and its file
        line = re.sub(r"^\S+( \(SYNTHETIC\))?, target", "TRACE, target", line)
        line = re.sub(r" \([^)]*\)", "", line)
        line = " ".join(re.sub(r"[\d.,]+", "#", line).split())
        if line and "mixed" not in line:
            lines.append(line)
    return lines


def test_the_readme_shows_what_the_demo_prints(shown: Shown) -> None:
    command, _, in_readme = blocks(ROOT / "README.md", "text")[0].partition("\n")

    assert command == "$ make demo"
    assert skeleton(in_readme) == skeleton(shown.text)


def test_the_demo_leaves_a_report_and_a_configuration_that_other_commands_take(shown: Shown) -> None:
    bound = kairos_apart("bound", "data/traces/some.csv.gz", "--fleet", "demo-out/kairos.yaml", cwd=shown.out.parent)

    assert "<svg" in (shown.out / "report.html").read_text()
    assert "can meet their TTFT target" in bound


def test_with_json_the_same_figures_and_decisions_are_in_the_one_thing_printed(shown: Shown) -> None:
    answer = json.loads(shown.json)
    asked = {request["request_id"] for request in answer["schedule"]["snapshot"]["waiting"]}
    cells = json.loads((shown.out / "results.json").read_text())["cells"]

    assert {row["request_id"] for row in answer["schedule"]["answer"]["prefill"]} == asked
    assert [cell["metrics"] for cell in answer["cells"]] == [cell["metrics"] for cell in cells]
    assert (len(answer["cells"]), answer["synthetic"]) == (12, False)
    assert all((shown.out.parent / path).exists() for path in answer["files"].values())


def test_no_service_is_left_running(shown: Shown) -> None:
    log = (shown.out / "serve.log").read_text()

    assert '"the service ends"' in log


@pytest.mark.parametrize("named", [None, "no-such-folder"])
def test_without_real_data_it_is_drawn_and_said_to_be_synthetic(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAIROS_DATA", raising=False)
    if named is not None:
        monkeypatch.setenv("KAIROS_DATA", named)

    data = _data(tmp_path)

    assert data.synthetic
    assert read_trace(data.trace).synthetic
    assert "SYNTHETIC" in capsys.readouterr().err


def test_a_long_trace_is_cut_where_the_demo_would_take_too_long() -> None:
    def limit_s(count: int, output_tokens: int) -> float | None:
        lengths = np.full(count, output_tokens)
        return _limit_s(Trace("made-up", np.arange(count, dtype=np.float64), lengths, lengths))

    assert limit_s(MOST_REQUESTS, 1) is None
    assert limit_s(MOST_REQUESTS + 1, 1) == MOST_REQUESTS
    assert limit_s(1000, MOST_OUTPUT_TOKENS // 100) == 99
