"""What simulate and compare leave behind: numbers that follow from the logs, runs that are not made twice."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import kairos

from kairos.adapters.simulator import scenario

SEEDS, STRATEGIES = 2, "engine-default,kairos"
FLEET = """\
profiles:
  one: {gpu: B300, model: a-model, step_times: {linear: {prefill: {a_s: 0.005, b_s: 1.0e-4}, decode: {a_s: 0.01}}}}
fleet:
  prefill: [{profile: one, chunk_tokens: 2048}]
  decode: [{profile: one, kv_tokens: 60000}]
slo: {classes: {default: {ttft_s: 1.0, tpot_s: 0.012}}}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(7.0, 1.2, 300)).astype(int) + 1
    rows = [f"{n * 0.25},{tokens},{n % 40 + 1},t{n % 2}" for n, tokens in enumerate(lengths)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["arrival_s,input_tokens,output_tokens,tenant", *rows, ""]))
    (tmp_path / "kairos.yaml").write_text(FLEET)
    return trace, tmp_path / "kairos.yaml"


def test_every_number_of_the_summary_follows_from_the_events_and_the_requests(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    trace, fleet = files
    out = tmp_path / "run"

    assert kairos("simulate", trace, "--fleet", fleet, "--noise", "0.1", "--load", "0.9", "--out", out).code == 0

    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    requests = list(csv.DictReader((out / "requests.csv").open()))
    events = pq.read_table(out / "events.parquet").to_pylist()
    tokens: dict[str, list[float]] = {}
    arrival: dict[str, float] = {}
    for event in events:
        if event["event"] == "token" or event["event"] == "first_token":
            tokens.setdefault(str(event["request_id"]), []).append(event["time_s"])
        elif event["event"] == "arrival":
            arrival[str(event["request_id"])] = event["time_s"]
    ttft, tpot, gaps, met = [], [], [], {"ttft": 0, "tpot": 0, "slo": 0}
    for row in requests:
        times = sorted(tokens[row["request_id"]])
        assert len(times) == int(row["output_tokens"])
        ttft.append(times[0] - arrival[row["request_id"]])
        per_token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        tpot += [] if per_token is None else [per_token]
        gaps += np.diff(times).tolist()
        in_time = ttft[-1] <= float(row["ttft_target_s"])
        smooth = per_token is None or per_token <= float(row["tpot_target_s"])
        met["ttft"] += in_time
        met["tpot"] += smooth
        met["slo"] += in_time and smooth
        assert (row["ttft_met"], row["tpot_met"]) == (str(in_time).lower(), str(smooth).lower())
    n = len(requests)
    span_s = max(arrival.values()) - min(arrival.values())
    last_s = max(times[-1] for times in map(sorted, tokens.values()))
    expected: dict[str, Any] = {f"{name}_attainment": count / n for name, count in met.items()}
    expected["goodput_per_s"] = met["slo"] / span_s
    expected["output_tokens_per_s"] = sum(map(len, tokens.values())) / (last_s - min(arrival.values()))
    expected["worst_wait_s"] = max(float(row["prefill_start_s"]) - float(row["arrival_s"]) for row in requests)
    assert 0 < met["slo"] < n, "a case in which nobody or everybody is in time shows nothing"
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    for name, values in (("ttft_s", ttft), ("tpot_s", tpot), ("itl_s", gaps)):
        quantiles = {
            "p50": np.quantile(values, 0.5),
            "p95": np.quantile(values, 0.95),
            "p99": np.quantile(values, 0.99),
        }
        assert metrics[name] == pytest.approx({**quantiles, "max": max(values)})


def compare(files: tuple[Path, Path], out: Path) -> dict[str, Any]:
    trace, fleet = files
    options = ("--strategies", STRATEGIES, "--seeds", SEEDS, "--loads", "0.9", "--noise", "0.1", "--jobs", 1)
    assert kairos("compare", trace, "--fleet", fleet, "--out", out, *options).code == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {key: results[key] for key in ("cells", "bounds", "pairs")}


def test_the_same_comparison_again_makes_no_run_twice(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = compare(files, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}

    again = compare(files, tmp_path / "out")

    assert len(kept) == SEEDS * len(STRATEGIES.split(","))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()} == kept
    assert again == first


@pytest.mark.parametrize("damage", [b"", b"not a run", None], ids=["empty", "rubbish", "truncated"])
def test_a_damaged_run_is_made_again(files: tuple[Path, Path], tmp_path: Path, damage: bytes | None) -> None:
    first = compare(files, tmp_path / "out")
    broken = min((tmp_path / "out" / "runs").iterdir())
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if damage is None else damage)

    again = compare(files, tmp_path / "out")

    assert len(broken.read_bytes()) > len(whole) / 2
    for cell in (*first["cells"], *again["cells"]):
        del cell["metrics"]["decision_us"]  # wall time
    assert again == first


def test_another_fleet_or_trace_under_the_same_name_makes_new_runs(files: tuple[Path, Path], tmp_path: Path) -> None:
    trace, fleet = files
    before = compare(files, tmp_path / "out")
    fleet.write_text(FLEET.replace("1.0e-4", "2.0e-4"))
    trace.write_text(trace.read_text() + "75.0,9,9,t0\n")
    for cached in (scenario.settings_of, scenario.fleet_of, scenario.workload_of, scenario._trace_of):
        cached.cache_clear()  # one process stands for two here

    assert compare(files, tmp_path / "out")["cells"] != before["cells"]
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2 * SEEDS * len(STRATEGIES.split(","))
