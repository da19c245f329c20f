"""Bad input ends with exit code 2 and one line on stderr that says what, where and how to mend it."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, kairos

from kairos.predictors.features import SCHEMA_HASH

TRACE = "arrival_s,input_tokens,output_tokens\n0.0,1000,5\n0.5,2000,5\n1.0,300,5\n"
FLEET = """\
profiles:
  one: {gpu: B300, model: a-model, step_times: {linear: {prefill: {b_s: 1.0e-5}, decode: {a_s: 0.01}}}}
fleet:
  prefill: [{profile: one}]
  decode: [{profile: one}]
"""

Simulate = Callable[..., Ended]


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """`kairos simulate` on a trace and a fleet given as text."""

    def run(*options: str, trace: str | bytes = TRACE, name: str = "trace.csv", fleet: str = FLEET) -> Ended:
        (tmp_path / name).write_bytes(trace if isinstance(trace, bytes) else trace.encode())
        (tmp_path / "kairos.yaml").write_text(fleet)
        files = (tmp_path / name, "--fleet", tmp_path / "kairos.yaml", "--out", tmp_path / "out")
        return kairos("simulate", *files, *options)

    return run


def assert_refused(ended: Ended, *says: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that names all of `says`."""
    assert (ended.code, ended.stdout) == (2, ""), ended
    assert ended.stderr.startswith("kairos: "), ended
    assert ended.stderr.count("\n") == 1, ended
    assert "Traceback" not in ended.stderr
    for part in says:
        assert part in ended.stderr, f"{part!r} is not in {ended.stderr!r}"


def test_the_input_of_these_tests_is_good_but_for_what_each_changes(simulate: Simulate, tmp_path: Path) -> None:
    ended = simulate()

    assert (ended.code, ended.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("requests.csv", "steps.csv", "events.parquet", "summary.json")
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival_s,input_tokens\n0,1\n", "output_tokens"),
        (TRACE.replace("input_tokens", "input_token"), "'input_token'"),
        (TRACE.replace("arrival_s,", "arrival_s,colour,"), "'colour'"),
        (TRACE.replace("2000", "-2000"), "-2000"),
        (TRACE.replace("2000", "nan"), "nan"),
        (TRACE.replace("0.5", "inf"), "inf"),
        (TRACE.replace("2000", "many"), "many"),
        (TRACE.splitlines()[0] + "\n", "trace.csv"),
        ("", "trace.csv"),
    ],
    ids=["missing column", "misspelt", "unknown", "negative", "nan", "infinite", "not a number", "no rows", "empty"],
)
def test_a_trace_that_cannot_be_read_is_refused_with_the_reason(simulate: Simulate, text: str, says: str) -> None:
    assert_refused(simulate(trace=text), "trace.csv", says)


def test_a_truncated_gzip_is_refused(simulate: Simulate) -> None:
    whole = gzip.compress((TRACE + "2.0,17,5\n" * 5_000).encode())

    assert_refused(simulate(trace=whole[: len(whole) // 2], name="trace.csv.gz"), "trace.csv.gz")


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    ended = kairos("simulate", tmp_path / "none.csv", "--fleet", "b300", "--out", tmp_path / "out")

    assert_refused(ended, "none.csv")


@pytest.mark.parametrize("fleet", ["b301", "no/such/file.yaml"])
def test_a_missing_fleet_is_refused(tmp_path: Path, fleet: str) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)

    assert_refused(kairos("simulate", tmp_path / "trace.csv", "--fleet", fleet, "--out", tmp_path / "out"), fleet)


def test_output_lengths_of_0_and_unsorted_arrivals_are_treated_and_counted(simulate: Simulate) -> None:
    ended = simulate(trace=TRACE.replace("0.0,1000,5", "9.0,1000,0"))

    assert ended.code == 0
    assert "output_tokens 0, counted as 1 token: 1 rows" in ended.stderr
    assert "sorted" in ended.stderr


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("kairo", "Did you mean 'kairos'?"),
        ("urgancy+late+headroom+envelope", "Did you mean 'urgency'?"),
        ("fcfs+late+headroom+slack(h=2,g=1)", "g"),
        ("fcfs+late", "fcfs+late"),
        ("no_module:NoClass+late+headroom+envelope", "no_module"),
    ],
)
def test_an_unknown_strategy_or_policy_is_refused_with_what_was_meant(
    simulate: Simulate, strategy: str, says: str
) -> None:
    assert_refused(simulate("--strategy", strategy), says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("prefill: [{profile: one}]", "prefill: [{profile: one, chunk_token: 1}]"), "fleet.prefill[0].chunk_token"),
        (("decode: [{profile: one}]", "decode: []"), "decode instance"),
        (("decode: [{profile: one}]", "decode: [{profile: two}]"), "fleet.decode[0].profile"),
        (("a_s: 0.01", "a_s: .nan"), "step_times.linear.decode.a_s"),
        (("linear: {prefill: {b_s: 1.0e-5}, decode: {a_s: 0.01}}", "model: none.kairos"), "none.kairos"),
    ],
    ids=["unknown field", "no decode instance", "unknown profile", "nan", "missing model"],
)
def test_a_fleet_that_cannot_be_used_is_refused_with_the_place(
    simulate: Simulate, change: tuple[str, str], says: str
) -> None:
    assert_refused(simulate(fleet=FLEET.replace(*change)), says)


def with_model(path: Path) -> str:
    return FLEET.replace("linear: {prefill: {b_s: 1.0e-5}, decode: {a_s: 0.01}}", f"model: {path}")


def test_a_model_of_another_schema_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    model = tmp_path / "old.kairos"
    model.write_bytes(b"kairos predictors\n" + b"0123abcd" + b"\nbody")

    assert_refused(simulate(fleet=with_model(model)), "old.kairos", "0123abcd", SCHEMA_HASH, "retrain")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "prefill.csv").write_text("gpu\n")
    takes = [tmp_path / "prefill.csv"] if command == "evaluate" else ["--profile", "x", "--new-tokens", 1]

    assert_refused(kairos(command, *takes, "--model", tmp_path / "notes.txt"), "notes.txt")


def test_a_model_that_no_instance_serves_is_rejected_and_counted(simulate: Simulate) -> None:
    text = "arrival_s,input_tokens,output_tokens,model\n0.0,1000,5,a-model\n0.5,1000,5,another\n"

    ended = simulate(trace=text)

    assert ended.code == 0
    assert "note: 1 requests rejected: no_instance_serves_model" in ended.stderr


def test_a_request_longer_than_any_kv_capacity_is_served_alone_and_counted(simulate: Simulate) -> None:
    ended = simulate(fleet=FLEET.replace("decode: [{profile: one}]", "decode: [{profile: one, kv_tokens: 1500}]"))

    assert ended.code == 0
    assert "note: 1 requests are longer than any decode instance's KV capacity" in ended.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--loads", "0.7,high"), "'0.7,high'"),
        (("--loads", "0.7", "--decode-loads", "0.5"), "--load and --decode-load"),
        (("--loads", "-1"), "-1"),
        (("--loads", "0"), "0"),
        (("--loads", "nan"), "nan"),
        (("--target", "soon"), "'soon'"),
        (("--target", "fixed:2/tpot:-1"), "-1"),
        (("--strategies", ","), "--strategies"),
    ],
)
def test_options_of_compare_that_make_no_sense_are_refused(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    files = (tmp_path / "trace.csv", "--fleet", "b300", "--out", tmp_path / "out", "--strategies", "kairos")

    assert_refused(kairos("compare", *files, *options), says)


@pytest.mark.parametrize("option", ["--load", "--time-scale", "--duration"])
@pytest.mark.parametrize("value", ["-1", "0", "nan"])
def test_times_that_cannot_be_scaled_are_refused(simulate: Simulate, option: str, value: str) -> None:
    assert_refused(simulate(option, value), value)


@pytest.mark.parametrize("option", ["--noise", "--predictor-error", "--jitter"])
def test_spreads_that_are_no_number_are_refused(simulate: Simulate, option: str) -> None:
    assert_refused(simulate(option, "nan"), option)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "file").write_text("")
    files = (tmp_path / "trace.csv", "--fleet", "b300", "--out", tmp_path / "file" / "out")

    assert_refused(kairos("simulate", *files), str(tmp_path / "file" / "out"))
    assert_refused(kairos("compare", *files, "--strategies", "kairos"), str(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulat",), "Did you mean 'simulate'?"),
        (("simulate",), "'TRACE'; see kairos simulate --help"),
        (("simulate", "trace.csv", "--noise", "-1", "--fleet", "b300", "--out", "x"), "--noise"),
        (("policies", "--colour"), "--colour"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    assert_refused(kairos(*arguments), says)


def test_a_command_that_needs_a_sub_command_shows_its_help() -> None:
    ended = kairos("trace")

    assert ended.code == 2
    assert "generate" in ended.stdout + ended.stderr
