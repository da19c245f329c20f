"""Telemetry files: what is read, what is left out and named, what is refused."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from kairos.adapters.telemetry_files import read_telemetry
from kairos.scheduler_core.errors import TelemetryError

DECODE = "gpu,model,precision,tp,ep,engine,run,batch_size,sum_context_tokens,latency_ms,prev_phase,flag"
PREFILL = "gpu,model,n_requests,new_tokens,cached_tokens,latency_ms"


def decode_file(folder: Path, *rows: str, header: str = DECODE, name: str = "decode.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def row(
    batch: object = 4, context: object = 4000, latency_ms: object = 12.5, phase: str = "decode", flag: str = ""
) -> str:
    return f"H100,acme/llama-8b,bf16,2,1,vllm,r1,{batch},{context},{latency_ms},{phase},{flag}"


def test_a_decode_file_is_read_into_columns_in_seconds(tmp_path: Path) -> None:
    (steps,) = read_telemetry([decode_file(tmp_path, row(), row(8, 9000, 20))]).steps

    assert steps.profile.profile_id == "h100_acme-llama-8b_bf16_2_1_vllm"
    assert steps.kind == "decode"
    assert steps.step_s.tolist() == [0.0125, 0.02]
    assert steps.batch_size.tolist() == [4, 8]
    assert steps.sum_context_tokens.tolist() == [4000, 9000]


def test_a_file_is_known_by_its_columns_and_optional_ones_may_lack(tmp_path: Path) -> None:
    path = decode_file(tmp_path, "H100,acme/llama-8b,1,512,0,30", header=PREFILL, name="whatever.csv")
    (steps,) = read_telemetry([path]).steps

    assert (steps.kind, steps.profile.tp, steps.new_tokens.tolist()) == ("prefill", 1, [512])


def test_csv_gz_and_parquet_say_the_same(tmp_path: Path) -> None:
    plain = decode_file(tmp_path, row(), row(8))
    zipped = tmp_path / "decode.csv.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    parquet = tmp_path / "decode.parquet"
    pa.parquet.write_table(pa.csv.read_csv(plain), parquet)
    seconds = [read_telemetry([path]).steps[0].step_s.tolist() for path in (plain, zipped, parquet)]

    assert seconds == [[0.0125, 0.0125]] * 3


def test_flagged_rows_are_left_out_and_counted_and_noisy_ones_kept(tmp_path: Path) -> None:
    flags = ["real;outlier", "suspect", "composed", "context_not_recorded", "noisy", "sweep"]
    read = read_telemetry([decode_file(tmp_path, *[row(flag=flag) for flag in flags])])

    assert read.excluded == {"outlier": 1, "suspect": 1, "composed": 1, "context_not_recorded": 1}
    assert read.steps[0].noisy.tolist() == [True, False]


@pytest.mark.parametrize(
    "bad",
    [row(latency_ms="nan"), row(latency_ms="inf"), row(latency_ms=-1), row(context=-5), row(batch=0), row(context="")],
)
def test_a_row_with_a_number_that_cannot_be_is_left_out_counted_and_named(tmp_path: Path, bad: str) -> None:
    read = read_telemetry([decode_file(tmp_path, row(), bad)])

    assert read.excluded == {"invalid": 1}
    assert "decode.csv: row 2 has" in read.notes[0]
    assert len(read.steps[0]) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot read"),
        (DECODE + "\n", "has a header but no rows"),
        (
            DECODE.replace("batch_size", "batchsize") + "\n" + row(),
            "unknown column 'batchsize'.*Did you mean 'batch_size'",
        ),
        (
            DECODE.replace("batch_size,", "") + "\n" + row().replace(",4,4000", ",4000"),
            "lacks the column.s. batch_size",
        ),
        (DECODE + "\n" + row(batch="four"), "cannot read .*four"),
        (DECODE + "\n" + row(phase="lunch"), "unknown prev_phase 'lunch'"),
        (DECODE + "\n" + row(flag="outlier"), "nothing usable .*1 outlier"),
        (DECODE.replace("flag", "run") + "\n" + row(), "has a column twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "decode.csv"
    path.write_text(content)

    with pytest.raises(TelemetryError, match=says):
        read_telemetry([path])


def test_a_truncated_gzip_is_said_to_be_unreadable(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join([DECODE, *[row(latency_ms=k + 1) for k in range(2000)]]).encode())
    path = tmp_path / "decode.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(TelemetryError, match=r"cannot read .*give a whole CSV"):
        read_telemetry([path])


def test_a_folder_gives_its_telemetry_and_names_what_is_something_else(tmp_path: Path) -> None:
    decode_file(tmp_path, row())
    (tmp_path / "p2p_transfer.csv").write_text("platform,link,bytes,latency_ms\nh100,intra,2048,0.1\n")
    read = read_telemetry([tmp_path])

    assert [steps.kind for steps in read.steps] == ["decode"]
    assert read.notes == ["p2p_transfer.csv: not step or request telemetry, left out"]


def test_missing_paths_and_folders_without_telemetry_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match="no such telemetry file or folder"):
        read_telemetry([tmp_path / "missing.csv"])
    with pytest.raises(TelemetryError, match="no prefill, decode, mixed or request_latency file"):
        read_telemetry([tmp_path])


def test_the_same_profile_and_kind_in_two_files_is_one_group_with_two_runs(tmp_path: Path) -> None:
    first = decode_file(tmp_path, row())
    second = decode_file(tmp_path, row().replace("r1", "r2"), name="decode2.csv")
    (steps,) = read_telemetry([first, second]).steps

    assert len(set(steps.run.tolist())) == 2


def test_request_latency_is_read_in_seconds_with_what_was_not_recorded_as_none(tmp_path: Path) -> None:
    header = "input_tokens,prefix_hit_ratio,kv_cache_usage,requests_running,requests_waiting,"
    header += "prefill_tokens_in_flight,decode_tokens_in_flight,ttft_ms,tpot_ms"
    path = decode_file(tmp_path, "48,0,0.5,3,1,100,200,64.5,", header=header, name="request_latency.csv")
    (request,) = read_telemetry([path]).requests

    assert (request.input_tokens, request.ttft_s, request.tpot_s) == (48, 0.0645, None)


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA names no data pack")
def test_the_data_pack_is_read_whole() -> None:
    read = read_telemetry([Path(os.environ["KAIROS_DATA"]) / "telemetry"])

    assert sum(len(steps) for steps in read.steps) + sum(read.excluded.values()) == 4852 + 102_985 + 3204
    assert "invalid" not in read.excluded
    assert len(read.requests) == 6460
