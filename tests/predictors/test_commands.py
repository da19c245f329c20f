"""`kairos train`, `evaluate`, `predict` as a user meets them."""

import json
from pathlib import Path

import pytest
import typer
from made_telemetry import PROFILE, decode_steps, prefill_steps
from typer.testing import CliRunner

from kairos.adapters.cli import models
from kairos.scheduler_core.errors import InputError, KairosError
from kairos.scheduler_core.telemetry import Steps

RUNNER = CliRunner()


def run(*arguments: object, stdin: str | None = None) -> str:
    app = typer.Typer()
    models.register(app)
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], input=stdin)
    if isinstance(result.exception, KairosError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def write(steps: Steps, path: Path) -> None:
    own = ["batch_size", "sum_context_tokens"]
    own = own if steps.kind == "decode" else ["n_requests", "new_tokens", "cached_tokens"]
    shape = steps.profile
    lines = [",".join(["gpu", "model", "precision", "engine", "latency_ms", *own])]
    for k in range(len(steps)):
        numbers = [steps.step_s[k] * 1e3, *(getattr(steps, name)[k] for name in own)]
        lines.append(",".join([shape.gpu, shape.model, shape.precision, shape.engine, *(f"{n:.9g}" for n in numbers)]))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def telemetry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telemetry")
    write(decode_steps(), folder / "decode.csv")
    write(prefill_steps(), folder / "prefill.csv")
    return folder


@pytest.fixture(scope="module")
def model(telemetry: Path) -> Path:
    path = telemetry.parent / "model.kairos"
    run("train", telemetry, "--out", path)
    return path


def test_train_prints_held_back_errors_against_the_prior(telemetry: Path, tmp_path: Path) -> None:
    answer = json.loads(run("train", telemetry, "--out", tmp_path / "m.kairos", "--json"))

    assert [row["kind"] for row in answer["rows"]] == ["decode", "prefill"]
    assert all(0 < row["median_ape"] < 0.03 for row in answer["rows"])
    assert all(row["median_ape"] <= 1.05 * row["prior_median_ape"] for row in answer["rows"])


def test_evaluate_has_the_shape_others_rely_on_and_beats_the_table(telemetry: Path) -> None:
    answer = json.loads(run("evaluate", telemetry, "--json"))

    assert answer["excluded"] == {}
    for row in answer["rows"]:
        assert row["profile"] == PROFILE.profile_id
        assert set(row) >= {"kind", "n", "median_ape", "mape", "p95_ape", "bias", "coverage", "pinball", "baselines"}
        assert set(row["coverage"]) == {"p10", "p90"}
        assert set(row["baselines"]) == {"prior", "linear", "lookup", "forest"}
        assert set(row["baselines"]["lookup"]) == {"median_ape", "mape", "p95_ape"}
        assert row["median_ape"] < 0.6 * row["baselines"]["lookup"]["median_ape"]
        assert row["coverage"]["p10"] < 0.3 < 0.8 < row["coverage"]["p90"]


def test_evaluate_with_a_model_scores_the_rows_it_is_given(model: Path, tmp_path: Path) -> None:
    write(decode_steps(seed=3, factor=1.5), tmp_path / "decode.csv")
    (row,) = json.loads(run("evaluate", tmp_path, "--model", model, "--json"))["rows"]

    assert row["n"] == 800
    assert row["bias"] == pytest.approx(1 / 1.5 - 1, abs=0.01)
    assert set(row["baselines"]) == {"prior", "linear", "lookup"}


def test_the_tables_for_people_name_profile_and_kind(telemetry: Path, model: Path) -> None:
    assert "median over profiles" in run("evaluate", telemetry / "prefill.csv")
    assert "learned from" in run("train", telemetry, "--out", model)


def test_predict_answers_from_arguments(model: Path) -> None:
    arguments = ("predict", "--model", model, "--profile", PROFILE.profile_id, "--batch-size", 8)
    answer = json.loads(run(*arguments, "--sum-context-tokens", 16_000, "--json"))

    assert answer["kind"] == "decode"
    assert answer["lower_s"] < answer["median_s"] < answer["upper_s"]
    assert answer["median_s"] == pytest.approx(5e-3 + 8 * 2e-5 + 16_000 * 3e-8, rel=0.02)


def test_predict_answers_json_lines_one_by_one(model: Path) -> None:
    lines = [{"profile": PROFILE.profile_id, "new_tokens": n} for n in (500, 5000)]
    answers = run("predict", "--model", model, stdin="\n".join(map(json.dumps, lines))).splitlines()

    assert [json.loads(a)["kind"] for a in answers] == ["prefill", "prefill"]
    assert json.loads(answers[0])["median_s"] < json.loads(answers[1])["median_s"]


def test_predict_for_an_unknown_profile_says_whose_numbers_it_uses(model: Path) -> None:
    answer = run("predict", "--model", model, "--profile", "a100_acme-llama-8b_bf16_1_1_vllm", "--new-tokens", 100)

    assert f"closest profile {PROFILE.profile_id}" in answer


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 of stdin"),
        ('{"profile": "x", "tokens": 3}', "unknown field `tokens`"),
        ('{"profile": "x", "new_tokens": -3}', "new_tokens"),
        ('{"profile": "x", "new_tokens": NaN}', "line 1 of stdin"),
        ('{"profile": "a_b_c_1_1_d"}', "a step needs new_tokens"),
        ('{"profile": "nonsense", "new_tokens": 1}', "unknown profile 'nonsense'"),
    ],
)
def test_a_bad_line_is_one_clear_error(model: Path, line: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run("predict", "--model", model, stdin=line + "\n")
