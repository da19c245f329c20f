"""Every public format becomes the same kind of trace, found by its looks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kairos.adapters.traces import describe, read_any, read_trace, write_trace
from kairos.adapters.traces.formats import sniff
from kairos.scheduler_core.errors import TraceError, UnknownNameError

MOONCAKE = """{"timestamp": 27482, "input_length": 1955, "output_length": 52, "hash_ids": [46, 47, 2353, 2354]}
{"timestamp": 30535, "input_length": 512, "output_length": 0, "hash_ids": [46]}
"""
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
2024-05-10 02:00:00.009930+02:00,1,1
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,GPT-4,417,276,693,API log
"""
BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log
19440161.0,d5983bf9,2,ChatGPT,0,29,29,Conversation log
"""
VLLM = {
    "model_id": "m",
    "request_rate": 2.0,
    "burstiness": 1.0,
    "input_lens": [100, 200, 7],
    "output_lens": [3, 2, 0],
    "ttfts": [0.1, 0.2, 0.0],
    "start_times": [10.0, 11.5, 12.0],
    "errors": ["", "", "boom"],
}


def written(folder: Path, text: str, name: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_mooncake_has_milliseconds_lengths_and_blocks_of_512_tokens(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, MOONCAKE, "conversation_trace.jsonl"))

    assert trace.name == "conversation_trace"
    assert trace.arrival_s.tolist() == [27.482, 30.535]
    assert trace.prompt_tokens.tolist() == [1955, 512]
    assert trace.output_tokens.tolist() == [52, 1]
    assert trace.notes == {"output_length 0, counted as 1 token": 1}
    assert trace.block_tokens == 512
    assert trace.block_ids is not None
    assert trace.block_ids[1] == (46,)


def test_mooncake_without_hash_ids_has_no_blocks(tmp_path: Path) -> None:
    row = '{"timestamp": 0, "input_length": 5, "output_length": 1}\n'

    assert read_any(written(tmp_path, row, "t.jsonl")).block_ids is None


def test_azure_of_2023_counts_from_its_first_request(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, AZURE_2023, "AzureLLMInferenceTrace_conv.csv"))

    assert trace.arrival_s.tolist() == [0.0, 4.314579]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([374, 396], [44, 109])


def test_azure_of_2024_has_time_zones(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, AZURE_2024, "AzureLLMInferenceTrace_code_1week.csv"))

    assert trace.arrival_s.tolist() == [0.0, 0.007405, 0.0]


def test_burstgpt_leaves_failed_requests_out_and_says_how_many(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, BURSTGPT, "BurstGPT_1.csv"))

    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.output_tokens.tolist() == [18, 276]
    assert trace.type == ["ChatGPT/Conversation log", "GPT-4/API log"]
    assert trace.model is None
    assert trace.notes == {"failed request (0 response tokens), left out": 1}


def test_burstgpt_with_sessions_keeps_them(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, BURSTGPT_SESSIONS, "BurstGPT_3.csv"))

    assert trace.session_id == ["1722ac82", "d5983bf9"]
    assert trace.prompt_tokens.tolist() == [906, 1]
    assert trace.notes == {"Request tokens 0, counted as 1 token": 1}


def test_a_vllm_bench_result_gives_its_start_times(tmp_path: Path) -> None:
    trace = read_any(written(tmp_path, json.dumps(VLLM), "vllm.json"))

    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([100, 200], [3, 2])
    assert not trace.synthetic
    assert trace.notes == {"failed request (0 output tokens), left out": 1}


def test_a_bench_result_without_start_times_draws_them_and_counts_as_synthetic(tmp_path: Path) -> None:
    run = {"request_rate": 4.0, "input_lens": [10] * 2_000, "output_lens": [5] * 2_000}
    path = written(tmp_path, json.dumps(run) + "\n", "sglang.jsonl")

    trace = read_any(path, seed=1)

    assert trace.synthetic
    assert trace.notes == {"arrival drawn from the file's request_rate with seed 1": 2_000}
    assert describe(trace).rate_per_s == pytest.approx(4.0, rel=0.1)
    assert np.array_equal(trace.arrival_s, read_any(path, seed=1).arrival_s)
    assert not np.array_equal(trace.arrival_s, read_any(path, seed=2).arrival_s)


def test_a_bench_at_infinite_rate_sends_everything_at_once(tmp_path: Path) -> None:
    run = VLLM | {"request_rate": "inf", "start_times": []}

    assert read_any(written(tmp_path, json.dumps(run), "vllm.json")).arrival_s.tolist() == [0.0, 0.0]


# -- ServeGen --------------------------------------------------------------------------------------------------------


def servegen(folder: Path) -> Path:
    """Two clients over two windows of 600 s: 5/s and 1/s Gamma, then silence and 2/s Weibull."""
    service = folder / "chat-model"
    service.mkdir()
    (service / "chunk-0-trace.csv").write_text("0,5.0,1.2,Gamma,0.7,0.2857\n600,0,0,,0,0\n")
    (service / "chunk-1-trace.csv").write_text("0,1.0,0.9,Gamma,1.2,0.83\n600,2.0,1.1,Weibull,0.9,0.475\n")
    lengths = {"input_tokens": "{100: 0.25, 200: 0.75}", "output_tokens": "{10: 1.0}"}
    later = {"input_tokens": "{7: 1.0}", "output_tokens": "{1: 0.5, 3: 0.5}"}
    (service / "chunk-0-dataset.json").write_text(json.dumps({"0": lengths}))
    (service / "chunk-1-dataset.json").write_text(json.dumps({"0": lengths, "600": later}))
    return service


def test_servegen_is_drawn_with_the_published_rates_and_lengths(tmp_path: Path) -> None:
    trace = read_any(servegen(tmp_path), duration_s=1200)

    early, late = trace.arrival_s < 600, trace.arrival_s >= 600
    assert int(early.sum()) == pytest.approx(3_600, rel=0.1)
    assert int(late.sum()) == pytest.approx(1_200, rel=0.15)
    assert set(np.array(trace.type)[late]) == {"synthetic/client1"}
    assert float(np.mean(trace.prompt_tokens[early])) == pytest.approx(175, rel=0.05)
    assert set(trace.prompt_tokens[late].tolist()) == {7}
    assert set(trace.output_tokens[late].tolist()) == {1, 3}
    assert trace.synthetic
    assert trace.notes == {"drawn from published statistics with seed 0": len(trace)}


def test_servegen_is_drawn_by_seed_and_window(tmp_path: Path) -> None:
    service = servegen(tmp_path)

    same = [read_any(service, seed=3, start_s=300, duration_s=100).arrival_s for _ in range(2)]
    other = read_any(service, seed=4, start_s=300, duration_s=100).arrival_s

    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], other)
    assert 0 <= same[0].min() <= same[0].max() < 100


def test_one_servegen_client_can_be_drawn_alone(tmp_path: Path) -> None:
    trace = read_any(servegen(tmp_path) / "chunk-1-trace.csv", duration_s=600)

    assert set(trace.type or []) == {"synthetic/client1"}


def test_a_servegen_trace_stays_synthetic_when_written_and_read(tmp_path: Path) -> None:
    write_trace(read_any(servegen(tmp_path), duration_s=50), tmp_path / "r1.csv")

    assert read_trace(tmp_path / "r1.csv").synthetic


# -- looks, windows and bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (MOONCAKE, "a.jsonl", "mooncake"),
        (AZURE_2023, "a.csv", "azure"),
        (BURSTGPT, "a.csv", "burstgpt"),
        (BURSTGPT_SESSIONS, "a.csv", "burstgpt"),
        (json.dumps(VLLM), "a.json", "bench"),
        ("arrival_s,input_tokens,output_tokens\n", "a.csv", "kairos"),
        ("0,5.0,1.2,Gamma,0.7,0.2857\n", "chunk-0-trace.csv", "servegen"),
        ("name,age\n", "a.csv", None),
    ],
)
def test_a_format_is_found_by_its_looks(text: str, name: str, found: str | None) -> None:
    assert sniff(Path(name), text) == found


def test_a_foreign_trace_where_one_of_ours_is_needed_is_told_to_be_converted(tmp_path: Path) -> None:
    for path in (written(tmp_path, AZURE_2023, "azure.csv"), servegen(tmp_path)):
        with pytest.raises(TraceError, match=r"looks like (azure|servegen), not like a trace of Kairos; see kairos"):
            read_trace(path)


def test_a_trace_of_ours_may_have_any_name(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens\n0,1,1\n", "prod-trace.csv")

    assert len(read_any(path)) == len(read_trace(path)) == 1


def test_a_forced_format_is_used_whatever_the_looks(tmp_path: Path) -> None:
    path = written(tmp_path, AZURE_2023, "a.csv")

    with pytest.raises(TraceError, match="unknown column 'TIMESTAMP'"):
        read_any(path, "kairos")


def test_an_unknown_format_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mooncake'"):
        read_any(written(tmp_path, MOONCAKE, "a.jsonl"), "moncake")


def test_a_window_counts_from_its_start(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens,tenant\n0,1,1,a\n5,2,1,b\n9,3,1,c\n", "a.csv")

    trace = read_any(path, start_s=4, duration_s=5)

    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.tenant) == ([1.0], [2], ["b"])


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("name,age\nx,1\n", "a.csv", "does not look like any known format"),
        (MOONCAKE + "{oops\n", "a.jsonl", "line 3: is not JSON"),
        (MOONCAKE + "[1]\n", "a.jsonl", "line 3: holds a list where a JSON object is expected"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 5}\n', "a.jsonl", "line 3: 'output_length' is missing"),
        (MOONCAKE.replace("1955", "-3"), "a.jsonl", "row 1 (line 1), column input_length: '-3' is negative"),
        (MOONCAKE.replace("1955", "NaN"), "a.jsonl", "column input_length: 'nan' is not a finite number"),
        (MOONCAKE.replace("[46]", '["x"]'), "a.jsonl", "line 2: hash_ids must be a list of integers"),
        (AZURE_2023.replace("2023-11-16 18:15:50.9951690", "yesterday"), "a.csv", "'yesterday' is not a date"),
        (AZURE_2023.replace("396", "x"), "a.csv", "row 2 (line 3), column ContextTokens: 'x' is not a number"),
        (BURSTGPT.replace(",18,", ",0,").replace(",276,", ",0,"), "a.csv", "every request failed"),
        (json.dumps({"request_rate": 1}), "a.json", "--save-detailed"),
        (json.dumps(VLLM | {"output_lens": [0, 0, 0]}), "a.json", "every request failed"),
        (json.dumps(VLLM | {"start_times": [1]}), "a.json", "start_times must be a list as long as input_lens (3)"),
        (json.dumps(VLLM | {"start_times": None, "request_rate": "trace"}), "a.json", "arrivals are unknown"),
        (json.dumps(VLLM | {"start_times": None, "request_rate": 0}), "a.json", "must be above 0"),
        (json.dumps(VLLM) + "\n" + json.dumps(VLLM), "a.jsonl", "holds 2 runs; keep the line of one"),
    ],
)
def test_bad_input_is_refused_with_its_place(tmp_path: Path, text: str, name: str, told: str) -> None:
    path = written(tmp_path, text, name)

    with pytest.raises(TraceError) as raised:
        read_any(path)

    assert told in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("chunk-0-trace.csv", "0,5.0,1.2,Pareto,0.7,0.3\n", "column law: 'Pareto' is not a gap law"),
        ("chunk-0-trace.csv", "0,5.0,1.2,Gamma,0,0.3\n", "column shape: '0' must be above 0"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{1: 1.0}"}}', "needs input_tokens and output_tokens"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "boom()", "output_tokens": "{}"}}', "time 0: needs"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{}", "output_tokens": "{}"}}', "lengths are unknown"),
    ],
)
def test_bad_servegen_files_are_refused(tmp_path: Path, file: str, text: str, told: str) -> None:
    service = servegen(tmp_path)
    (service / file).write_text(text)

    with pytest.raises(TraceError, match=told.replace("(", "\\(")):
        read_any(service, duration_s=100)


def test_a_window_in_which_nothing_arrives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nothing arrives from 100 to 110 s; arrivals lie between 0 and 4"):
        read_any(written(tmp_path, AZURE_2023, "a.csv"), start_s=100, duration_s=10)
    with pytest.raises(TraceError, match="nothing is published from 5000 to 5010 s"):
        read_any(servegen(tmp_path), start_s=5000, duration_s=10)


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA is not set")
def test_a_trace_of_the_data_pack_is_found_to_be_ours() -> None:
    path = Path(os.environ["KAIROS_DATA"]) / "traces" / "azure2023_code.csv.gz"

    assert len(read_any(path)) == len(read_trace(path)) == 7_717
