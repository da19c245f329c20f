"""`kairos telemetry load`: what files hold goes into the database once; on both databases."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import kairos
from sqlalchemy import select

from kairos.adapters.telemetry_files import read_telemetry
from kairos.scheduler_core.service.store.queries.telemetry import read_steps
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.tables import Recording, Request

DECODE = "gpu,model,precision,tp,ep,engine,run,batch_size,sum_context_tokens,latency_ms,prev_phase,flag\n"
REQUEST = (
    "trace,gpu,model,tp,input_tokens,prefix_hit_ratio,kv_cache_usage,requests_running,requests_waiting,"
    "prefill_tokens_in_flight,decode_tokens_in_flight,ttft_ms,tpot_ms\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six steps of which one is an outlier and one impossible, two requests, and a file of something else."""
    folder = tmp_path / "telemetry"
    folder.mkdir()
    rows = [f"H100,m,bf16,2,1,vllm,r{n % 2},{n + 1},{900 * (n + 1)},{10 + n},decode,{flag}" for n, flag in ROWS]
    (folder / "decode.csv").write_text(DECODE + "\n".join(rows) + "\n")
    (folder / "request_latency.csv").write_text(
        REQUEST + "t1,H200,q,1,48,0.5,0.25,3,1,100,200,64.5,\nt1,H200,q,1,88,0,0,0,0,0,0,50,7.5\n"
    )
    (folder / "links.csv").write_text("link,bytes\nnvlink,1\n")
    return folder


ROWS = [(0, ""), (1, "noisy"), (2, "outlier"), (3, ""), (-1, ""), (5, "sweep")]


def test_what_files_hold_is_stored_once_and_what_is_left_out_is_said(store: Store, url: str, folder: Path) -> None:
    first = kairos("telemetry", "load", folder, "--url", url)
    again = json.loads(kairos("telemetry", "load", folder / "decode.csv", "--url", url, "--json").stdout)

    assert first.code == 0
    assert first.stdout == (
        f"{folder}/decode.csv: 4 stored, 0 there before, 1 invalid left out, 1 outlier left out\n"
        f"{folder}/request_latency.csv: 2 stored, 0 there before\n"
    )
    assert "links.csv: not step or request telemetry, left out" in first.stderr
    assert "row 5 has batch_size 0" in first.stderr
    assert [(file["stored"], file["there_before"]) for file in again] == [(0, 4)]


def test_what_is_read_back_is_what_the_files_say(store: Store, url: str, folder: Path) -> None:
    kairos("telemetry", "load", folder, "--url", url)
    read = read_telemetry([folder])
    (stored,), _ = read_steps(store)
    with store.read() as connection:
        runs = {row.id: row.run for row in connection.execute(select(Recording.id, Recording.run))}
        requests = connection.execute(select(Request.input_tokens, Request.ttft_s, Request.tpot_s)).all()

    assert (stored.profile, stored.kind) == (read.steps[0].profile, "decode")
    for name in ("step_s", "batch_size", "sum_context_tokens", "prev_phase", "noisy"):
        np.testing.assert_allclose(getattr(stored, name), getattr(read.steps[0], name))
    assert [runs[run] for run in stored.run.tolist()] == [read.runs[run] for run in read.steps[0].run.tolist()]
    assert {runs[run] for run in stored.run.tolist()} == {"r0", "r1"}
    assert [tuple(r) for r in requests] == [(48, 0.0645, None), (88, 0.05, 0.0075)]


def test_a_file_that_cannot_be_read_ends_with_one_line_and_exit_code_2(store: Store, url: str, tmp_path: Path) -> None:
    (tmp_path / "decode.csv").write_text("gpu,model\nH100,m\n")
    ended = kairos("telemetry", "load", tmp_path / "decode.csv", "--url", url)

    assert ended.code == 2
    assert "lacks the column(s) latency_ms" in ended.stderr


def test_a_number_beyond_what_a_step_can_have_is_refused(store: Store, url: str, tmp_path: Path) -> None:
    (tmp_path / "decode.csv").write_text(DECODE + "H100,m,bf16,2,1,vllm,r,5000000000,9,10,decode,\n")
    ended = kairos("telemetry", "load", tmp_path / "decode.csv", "--url", url)

    assert (ended.code, "batch_size" in ended.stderr) == (2, True)
    assert read_steps(store)[0] == []


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_shared_database_that_nobody_upgraded_is_refused_with_what_to_run(url: str, folder: Path) -> None:
    ended = kairos("telemetry", "load", folder, "--url", url)

    assert ended.code == 1
    assert "run kairos db upgrade" in ended.stderr


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA names no data pack")
def test_the_data_pack_is_stored_whole(store: Store, url: str) -> None:
    files = json.loads(
        kairos("telemetry", "load", Path(os.environ["KAIROS_DATA"]) / "telemetry", "--url", url, "--json").stdout
    )
    stored, _ = read_steps(store)

    assert sum(f["stored"] + sum(f["excluded"].values()) for f in files) == 4852 + 102_985 + 3204 + 6460
    assert sum(len(steps) for steps in stored) == sum(f["stored"] for f in files) - 6460
