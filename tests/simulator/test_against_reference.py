"""The project's simulator against the reference: every request of every case, to the microsecond."""

import csv
import subprocess
import sys
from itertools import islice
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from simulator.cases import CASES, Case, by_name, strategy_text, to_trace_csv, to_yaml
from simulator.reference import Result, Row, Step, simulate

from kairos.adapters.simulator import run as project
from kairos.adapters.simulator.fleet import build_fleet
from kairos.adapters.simulator.run import Knobs
from kairos.adapters.simulator.tables import STATUSES
from kairos.adapters.simulator.workload import build_workload
from kairos.adapters.traces import read_trace
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.strategy import parse_strategy

TOLERANCE_S = 1e-6


def run_project(case: Case) -> list[Row]:
    """The rows of the project's simulator for a case, by request id."""
    with TemporaryDirectory() as folder:
        trace, fleet = Path(folder, "trace.csv"), Path(folder, "kairos.yaml")
        trace.write_text(to_trace_csv(case))
        fleet.write_text(to_yaml(case))
        settings = load_settings(fleet)
        simulated = build_fleet(settings, step_times_of)
        workload = build_workload(read_trace(trace), settings.slo, simulated.prefill[0].instance.step_times)
    knobs = Knobs(deferred_share=settings.guards.deferred_share)
    run = project.simulate(workload, simulated, parse_strategy(strategy_text(case)), knobs)
    assert not run.fallbacks
    table = run.requests
    columns = (
        [None if index < 0 else int(index) for index in table.prefill_instance],
        [None if index < 0 else int(index) for index in table.decode_instance],
        *(
            [None if isnan(value) else value for value in column.tolist()]
            for column in (
                table.prefill_start_s,
                table.first_token_s,
                table.decode_ready_s,
                table.last_token_s,
                table.max_itl_s,
            )
        ),
        [STATUSES[code] for code in table.status],
    )
    return [Row(*values) for values in zip(*columns, strict=True)]


def reference(case: Case) -> Result:
    return simulate(case.requests, case.fleet, case.strategy)


def differences(expected: list[Row], actual: list[Row]) -> list[str]:
    """One line for each value that is further off than the tolerance, the earliest first token first."""
    assert len(expected) == len(actual)
    found = []
    for request_id, (one, other) in enumerate(zip(expected, actual, strict=True)):
        for column, wanted, got in zip(Row._fields, one, other, strict=True):
            if not _same(wanted, got):
                line = f"request {request_id} {column}: {got}, the reference says {wanted}"
                found.append((one.first_token_s, line))
    return [line for _, line in sorted(found)]


def _same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, float) and isinstance(got, float):
        return abs(wanted - got) <= TOLERANCE_S
    return bool(wanted == got)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_simulator_agrees_with_the_reference(case: Case) -> None:
    found = differences(reference(case).rows, run_project(case))

    assert not found, "\n".join([f"{len(found)} values differ; the earliest:", *islice(found, 5)])


def test_a_value_is_different_beyond_a_microsecond_or_when_only_one_side_has_it() -> None:
    row = Row(0, 1, 1.0, 2.0, 2.5, 3.0, 0.5, "finished")
    near, far = row._replace(last_token_s=3.0 + 9e-7), row._replace(last_token_s=3.0 + 2e-6)
    absent, elsewhere = row._replace(max_itl_s=None), row._replace(decode_instance=0)

    assert [len(differences([row], [other])) for other in (row, near, far, absent, elsewhere)] == [0, 0, 1, 1, 1]


# -- through the public files ------------------------------------------------------------------------------------------

BY_FILES = [
    "edf-lost_last-preempt-timed",
    "mixed-fleet-least-laxity-round-robin-grid",
    "kv-pressure-slack-short-grid",
    "first-token-by-decode-slack-timed",
]


@pytest.mark.parametrize("name", BY_FILES)
def test_the_files_of_kairos_simulate_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    case = by_name(name)
    out = simulate_by_files(case, tmp_path)
    expected = reference(case)

    found = differences(expected.rows, read_rows(out / "requests.csv"))

    assert not found, "\n".join([f"{len(found)} values differ; the earliest:", *islice(found, 5)])
    assert _rounded(read_steps(out / "steps.csv")) == _rounded(expected.steps)


def simulate_by_files(case: Case, folder: Path) -> Path:
    """Runs `kairos simulate` on the files of a case; the folder with its results."""
    trace, fleet, out = folder / "trace.csv", folder / "kairos.yaml", folder / "out"
    trace.write_text(to_trace_csv(case))
    fleet.write_text(to_yaml(case))
    program = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", "simulate"]
    options = ["--fleet", str(fleet), "--strategy", strategy_text(case), "--out", str(out)]
    ended = subprocess.run([*program, str(trace), *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return out


def read_rows(path: Path) -> list[Row]:
    """The compared columns of a requests.csv, by request id."""
    with path.open(newline="") as lines:
        records = sorted(csv.DictReader(lines), key=lambda record: int(record["request_id"]))
    return [Row(**{column: _value(column, record[column]) for column in Row._fields}) for record in records]


def _value(column: str, text: str) -> Any:
    if column == "status":
        return text
    if not text:
        return None
    return int(text.rsplit("-", 1)[1]) if column.endswith("_instance") else float(text)


def read_steps(path: Path) -> list[Step]:
    """The compared columns of a steps.csv."""
    with path.open(newline="") as lines:
        return [
            Step(
                record["instance"],
                float(record["start_s"]),
                float(record["end_s"]),
                tuple(sorted(int(one) for one in record["request_ids"].split())),
                int(record["sum_context_tokens"]),
            )
            for record in csv.DictReader(lines)
        ]


def _rounded(steps: list[Step]) -> list[tuple[str, int, float, float, tuple[int, ...], int]]:
    """Steps of each instance in turn, times to 10 us, numbered so that equal rounded times keep their order."""
    ordered = sorted(steps, key=lambda step: (step.instance, step.start_s))
    return [
        (step.instance, i, round(step.start_s, 5), round(step.end_s, 5), step.request_ids, step.sum_context_tokens)
        for i, step in enumerate(ordered)
    ]


# -- the files say what the case says ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_files_of_a_case_give_its_requests_and_instances_back(case: Case) -> None:
    document = yaml.safe_load(to_yaml(case))
    classes = document["slo"]["classes"]
    trace = [
        (
            float(line["arrival_s"]),
            int(line["input_tokens"]),
            int(line["output_tokens"]),
            classes[line["slo_class"]]["ttft_s"],
            classes[line["slo_class"]]["tpot_s"],
        )
        for line in csv.DictReader(to_trace_csv(case).splitlines())
    ]

    assert trace == case.requests
    assert _instances(document, "prefill") == case.fleet["prefill"]
    assert _instances(document, "decode") == case.fleet["decode"]


def _instances(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The instances of a configuration as the reference takes them."""
    instances = []
    for group in document["fleet"][kind]:
        line = document["profiles"][group.pop("profile")]["step_times"]["linear"][kind]
        count = group.pop("count")
        if kind == "decode":
            group.setdefault("batch_limit", None)
        instances += [{"a": line["a_s"], "b": line["b_s"], "c": line["c_s"]} | group] * count
    return instances
