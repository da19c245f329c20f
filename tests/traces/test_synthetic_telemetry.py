"""Synthetic telemetry: the data pack's columns, the physics it is drawn from, and that it says what it is."""

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from kairos.adapters.simulator.fleets import load_fleet
from kairos.adapters.telemetry_files import read_telemetry
from kairos.adapters.traces.synthetic_telemetry import PROFILES, write_telemetry
from kairos.scheduler_core.errors import TelemetryError

Rows = list[dict[str, str]]


def rows_of(path: Path) -> Rows:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    folder = tmp_path_factory.mktemp("data") / "telemetry"
    return {path.name.split(".")[0]: rows_of(path) for path in write_telemetry(folder, seed=0)}


def test_every_row_says_that_it_is_synthetic(files: dict[str, Rows]) -> None:
    assert {row["source"] for rows in files.values() for row in rows} == {"synthetic"}


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA is not set")
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_the_columns_are_those_of_the_data_pack(files: dict[str, Rows], kind: str) -> None:
    theirs = rows_of(Path(os.environ["KAIROS_DATA"]) / "telemetry" / f"{kind}.csv.gz")

    assert list(files[kind][0]) == list(theirs[0])


def test_a_seed_fixes_the_bytes(tmp_path: Path) -> None:
    written = [[p.read_bytes() for p in write_telemetry(tmp_path / name, seed)] for name, seed in (("a", 1), ("b", 1))]
    other = [p.read_bytes() for p in write_telemetry(tmp_path / "c", 2)]

    assert written[0] == written[1]
    assert written[0] != other


def test_the_fleets_b300_and_h100_find_their_profile(files: dict[str, Rows]) -> None:
    columns = ("gpu", "model", "precision", "tp", "ep", "engine")
    found = {tuple(row[column] for column in columns) for row in files["decode"]}

    for fleet in ("b300", "h100"):
        for settings in load_fleet(fleet, {}).profiles.values():
            profile = settings.as_profile()
            assert tuple(str(getattr(profile, column)) for column in columns) in found
    assert len(found) == len(PROFILES)


def test_outliers_are_few_flagged_and_far_off(files: dict[str, Rows]) -> None:
    for rows in files.values():
        flagged = [row for row in rows if "outlier" in row["flag"]]
        assert 0.001 < len(flagged) / len(rows) < 0.02


def test_decode_steps_follow_their_line_and_the_padding_to_a_cuda_graph(files: dict[str, Rows]) -> None:
    synthetic = PROFILES[0]
    rows = [row for row in files["decode"] if row["gpu"] == synthetic.profile.gpu and row["flag"] == "real"]
    graph = {17: 24, 24: 24, 9: 16, 1: 1, 33: 40}
    checked = 0
    for row in rows:
        batch = int(row["batch_size"])
        if batch in graph:
            a_s, b_s, c_s = synthetic.decode
            step_s = a_s + b_s * batch + c_s * int(row["sum_context_tokens"]) + synthetic.padding_s * graph[batch]
            assert float(row["latency_ms"]) / 1000 == pytest.approx(step_s, rel=0.15)
            checked += 1
    assert checked > 50


def test_prefill_steps_grow_with_the_tokens_computed(files: dict[str, Rows]) -> None:
    synthetic = PROFILES[0]
    rows = [row for row in files["prefill"] if row["gpu"] == synthetic.profile.gpu and row["flag"] == "real"]
    alone = [row for row in rows if row["n_requests"] == "1"]
    a_s, b_s, c_s = synthetic.prefill
    new, cached, ms = (
        np.array([float(row[name]) for row in alone]) for name in ("new_tokens", "cached_tokens", "latency_ms")
    )

    assert len(alone) > 100
    assert ms / 1000 == pytest.approx(a_s + b_s * new + c_s * new * (cached + new / 2), rel=0.15)


def test_the_readers_of_telemetry_take_it_and_leave_only_outliers_out(tmp_path: Path) -> None:
    write_telemetry(tmp_path, seed=0)

    telemetry = read_telemetry([tmp_path])

    assert {(steps.profile, steps.kind) for steps in telemetry.steps} == {
        (each.profile, kind) for each in PROFILES for kind in ("prefill", "decode")
    }
    assert set(telemetry.excluded) == {"outlier"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(TelemetryError, match="cannot be written"):
        write_telemetry(tmp_path / "file" / "telemetry", seed=0)
