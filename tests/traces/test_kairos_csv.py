"""Kairos's own trace format: what is read, what is treated and counted, what is refused."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.adapters.traces import Trace, read_any, read_trace, write_trace
from kairos.scheduler_core.errors import TraceError

HEADER = "arrival_s,input_tokens,output_tokens"
DATA = os.environ.get("KAIROS_DATA")


def written(folder: Path, text: str, name: str = "chat.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as raised:
        read_trace(path)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(str(path))


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_trace_has_its_files_name_and_its_rows_in_file_order(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER}\n0.5,10,3\n1.25,20,4\n"))

    assert trace.name == "chat"
    assert trace.arrival_s.tolist() == [0.5, 1.25]
    assert trace.prompt_tokens.tolist() == [10, 20]
    assert trace.output_tokens.tolist() == [3, 4]
    assert trace.notes == {}


def test_a_gzip_trace_is_read_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "chat.csv.old"
    path.write_bytes(gzip.compress(f"{HEADER}\n0,10,3\n".encode()))

    assert read_trace(path).prompt_tokens.tolist() == [10]


def test_labels_are_kept_and_a_column_without_any_is_none(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER},tenant,slo_class,model\n0,1,1,acme,,qwen\n1,1,1,,,\n"))

    assert (trace.tenant, trace.slo_class, trace.model) == (["acme", ""], None, ["qwen", ""])


def test_request_ids_are_integers_only_when_all_are(tmp_path: Path) -> None:
    numbers = read_trace(written(tmp_path, f"{HEADER},request_id\n0,1,1,7\n1,1,1,3\n"))
    texts = read_trace(written(tmp_path, f"{HEADER},request_id\n0,1,1,7\n1,1,1,b\n"))
    padded = read_trace(written(tmp_path, f"{HEADER},request_id\n0,1,1,07\n1,1,1,7\n"))

    assert (numbers.request_id, texts.request_id, padded.request_id) == ([7, 3], ["7", "b"], ["07", "7"])


@pytest.mark.parametrize("block_tokens", [16, 64, 512])
def test_the_block_size_is_the_smallest_power_of_two_that_explains_the_number_of_ids(
    tmp_path: Path, block_tokens: int
) -> None:
    prompts = [1, 100, 5_000, 777, 12_345]
    rows = [f"0,{n},1,{' '.join(map(str, range(-(-n // block_tokens))))}" for n in prompts]

    trace = read_trace(written(tmp_path, "\n".join([f"{HEADER},hash_ids", *rows])))

    assert trace.block_tokens == block_tokens
    assert trace.block_ids is not None
    assert trace.block_ids[1] == tuple(range(-(-100 // block_tokens)))


def test_a_trace_is_synthetic_by_its_name_or_by_its_type(tmp_path: Path) -> None:
    by_name = read_trace(written(tmp_path, f"{HEADER}\n0,1,1\n", "synthetic_chat.csv"))
    by_type = read_trace(written(tmp_path, f"{HEADER},type\n0,1,1,synthetic\n", "chat.csv"))
    recorded = read_trace(written(tmp_path, f"{HEADER},type\n0,1,1,synthetic\n1,1,1,chat\n", "chat.csv"))

    assert (by_name.synthetic, by_type.synthetic, recorded.synthetic) == (True, True, False)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    n = draw(st.integers(1, 12))
    lengths = st.lists(st.integers(1, 10**6), min_size=n, max_size=n)
    prompt_tokens = np.array(draw(lengths))
    column = st.one_of(st.none(), st.lists(st.text("abcXYZ ,\"'é\n", min_size=1, max_size=6), min_size=n, max_size=n))
    with_blocks = draw(st.booleans())
    return Trace(
        name="chat",
        arrival_s=np.array(draw(st.lists(st.floats(0, 1e9), min_size=n, max_size=n))),
        prompt_tokens=prompt_tokens,
        output_tokens=np.array(draw(lengths)),
        request_id=[*draw(st.permutations(range(n)))] if draw(st.booleans()) else None,
        block_ids=[tuple(range(-(-p // 512))) for p in prompt_tokens.tolist()] if with_blocks else None,
        tenant=draw(column),
        session_id=draw(column),
    )


@given(trace=traces(), ending=st.sampled_from([".csv", ".csv.gz"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, ending: str
) -> None:
    path = tmp_path_factory.mktemp("traces") / f"chat{ending}"

    write_trace(trace, path)
    again = read_trace(path)

    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    for name in ("name", "request_id", "block_ids", "tenant", "session_id", "model"):
        assert getattr(trace, name) == getattr(again, name)


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER}\n0,1,1\n"))
    write_trace(trace, tmp_path / "a.csv.gz")
    write_trace(trace, tmp_path / "b.csv.gz")

    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


@pytest.mark.skipif(DATA is None, reason="KAIROS_DATA is not set")
@pytest.mark.parametrize(
    ("name", "rows", "block_tokens"),
    [("servegen_r1_resampled", 16_635, 0), ("mooncake_conversation", 8_777, 512), ("lmcache_agents", 1_566, 64)],
)
def test_a_trace_of_the_data_pack_is_read_fast_and_without_treatment(name: str, rows: int, block_tokens: int) -> None:
    path = Path(str(DATA)) / "traces" / f"{name}.csv.gz"
    began = time.process_time()
    trace = read_trace(path)

    assert time.process_time() - began < 1.0  # 0.02 to 0.06 s on an idle machine
    assert (len(trace), trace.block_tokens, trace.notes) == (rows, block_tokens, {})


# -- what is treated and counted -------------------------------------------------------------------------------------


def test_an_output_of_0_counts_as_1_token_and_is_named(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER}\n0,5,0\n1,5,2\n2,5,0\n"))

    assert trace.output_tokens.tolist() == [1, 2, 1]
    assert trace.notes == {"output_tokens 0, counted as 1 token": 2}


def test_an_input_of_0_counts_as_1_token_and_is_named(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER}\n0,0,4\n"))

    assert trace.prompt_tokens.tolist() == [1]
    assert trace.notes == {"input_tokens 0, counted as 1 token": 1}


def test_unsorted_arrivals_keep_their_file_order_and_are_counted(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, f"{HEADER}\n5,1,1\n3,2,1\n4,3,1\n"))

    assert trace.arrival_s.tolist() == [5, 3, 4]
    assert trace.notes == {"arrives before the row above, sorted by (arrival, file order) when run": 1}


def test_rows_whose_block_ids_do_not_fit_their_prompt_are_counted(tmp_path: Path) -> None:
    rows = [f"{i},100,1,0 1" for i in range(39)] + ["39,100,1,0 1 2 3 4"]

    trace = read_trace(written(tmp_path, "\n".join([f"{HEADER},hash_ids", *rows])))

    assert trace.block_tokens == 64
    assert trace.notes == {"number of hash_ids does not fit the prompt in blocks of 64 tokens": 1}


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "chat.csv"
    path.write_bytes(f"{HEADER}\r\n0,5,1\r\n\r\n1,6,1\r\n".encode("utf-8-sig"))

    assert read_trace(path).prompt_tokens.tolist() == [5, 6]


@pytest.mark.parametrize("cell", ["12.0", "1.2e1", " 12 "])
def test_a_whole_length_may_be_written_in_any_notation(tmp_path: Path, cell: str) -> None:
    assert read_trace(written(tmp_path, f"{HEADER}\n0,{cell},1\n")).prompt_tokens.tolist() == [12]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("0,-5,1", "column input_tokens: '-5' is negative; a length is a whole number of tokens"),
        ("0,5,-1", "column output_tokens: '-1' is negative; a length is a whole number of tokens"),
        ("0,nan,1", "column input_tokens: 'nan' is not a finite number"),
        ("0,5,inf", "column output_tokens: 'inf' is not a finite number"),
        ("0,5.5,1", "column input_tokens: '5.5' is not whole; a length is a whole number of tokens"),
        ("0,five,1", "column input_tokens: 'five' is not a number"),
        ("0,,1", "column input_tokens: '' is missing; every row needs a number"),
        ("0,1e12,1", "column input_tokens: '1e12' is too large; a length is at most 100000000 tokens"),
        ("-1,5,1", "column arrival_s: '-1' is negative; arrivals are seconds from the start of the trace"),
        ("nan,5,1", "column arrival_s: 'nan' is not a finite number"),
        ("-inf,5,1", "column arrival_s: '-inf' is not a finite number"),
        ("1e300,5,1", "column arrival_s: '1e300' is too large; arrivals are seconds from the start of the trace"),
        ("2023-11-16,5,1", "column arrival_s: '2023-11-16' is not a number"),
    ],
)
def test_a_bad_cell_is_refused_with_its_row_column_and_value(tmp_path: Path, row: str, told: str) -> None:
    path = written(tmp_path, f"{HEADER}\n0,5,1\n\n{row}\n")

    assert refusal(path) == f", row 2 (line 4), {told}"


def test_an_unknown_column_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,input_tokns,output_tokens\n0,1,1\n")

    assert "header: unknown column 'input_tokns'. Did you mean 'input_tokens'?" in refusal(path)


def test_a_missing_column_is_named_with_all_that_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,input_tokens\n0,1\n")

    told = ", header: column 'output_tokens' is missing; needed: arrival_s, input_tokens, output_tokens"
    assert refusal(path) == told


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER},arrival_s\n0,1,1,0\n")

    assert refusal(path) == ", header: column 'arrival_s' occurs 2 times; keep one"


def test_a_row_with_too_few_cells_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n0,1,1\n0,1\n")

    assert refusal(path) == ", line 3: has 2 cells, the header 3; give every row one cell a column"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(written(tmp_path, text)) == ": is empty; a trace has a header and one row a request"


def test_an_empty_gzip_file_is_refused(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "", "chat.csv.gz")) == ": is empty; a trace has a header and one row a request"


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + "\n")

    assert refusal(path) == ": has a header and no rows; a trace needs at least one request"


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.csv.gz"
    path.write_bytes(gzip.compress(b"x" * 1000)[:-9])

    assert refusal(path) == ": the gzip data end too early; copy or download the file again"


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chat.csv.gz"
    raw = bytearray(gzip.compress(f"{HEADER}\n0,1,1\n".encode()))
    raw[-6] ^= 0xFF  # the checksum
    path.write_bytes(raw)

    assert refusal(path).startswith(": the gzip data are damaged")


def test_a_plain_file_named_gz_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n0,1,1\n", "chat.csv.gz")

    assert refusal(path) == ": is named .gz but does not hold gzip data; rename or compress it"


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00\x01" * 50, b"PK\x03\x04\x00\x00\x00abc"])
def test_binary_data_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "chat.csv"
    path.write_bytes(raw)

    assert refusal(path).startswith(": is not text")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "chat.csv")


def test_request_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER},request_id\n0,1,1,a\n1,1,1,b\n2,1,1,a\n")

    assert refusal(path) == ", row 3 (line 4), column request_id: 'a' occurs already in row 1; ids must differ"


def test_block_ids_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER},hash_ids\n0,1,1,0\n0,1,1,0 x\n")

    told = ", row 2 (line 3), column hash_ids: '0 x' is not a list of integers with spaces between"
    assert refusal(path) == told


def test_block_ids_that_fit_no_block_size_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER},hash_ids\n0,10,1,{' '.join(map(str, range(11)))}\n")

    assert refusal(path).startswith(", column hash_ids: no block size (a power of two up to 65536 tokens)")


@given(raw=st.binary(max_size=80), lead=st.sampled_from([b"", b"{", HEADER.encode() + b"\n", b"\x1f\x8b"]))
@settings(max_examples=200, deadline=None)
def test_whatever_a_file_holds_the_answer_is_a_trace_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, lead: bytes
) -> None:
    path = tmp_path_factory.mktemp("traces") / "chat.csv"
    path.write_bytes(lead + raw)

    told = str(path)
    try:
        requests = len(read_any(path))
    except TraceError as error:
        requests, told = 1, str(error)

    assert requests > 0
    assert str(path) in told
