"""The model file: what is written is read, and anything else is refused in words."""

import zlib
from pathlib import Path

import pytest
from made_telemetry import PROFILE, decode_steps, prefill_steps

from kairos.predictors.artifact import load, save
from kairos.predictors.features import SCHEMA_HASH
from kairos.predictors.profiles import step_times_of
from kairos.predictors.training import train
from kairos.scheduler_core.config import ProfileSettings, Settings
from kairos.scheduler_core.domain import Part
from kairos.scheduler_core.errors import InputError, SchemaError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.kairos"
    save(list(train([prefill_steps(), decode_steps()])), path)
    return path


def test_a_model_comes_back_as_it_was_written(model: Path) -> None:
    learned = list(train([prefill_steps(), decode_steps()]))

    assert load(model).learned == {PROFILE.profile_id: learned[0]}


def test_a_model_of_another_feature_schema_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.kairos"
    other.write_bytes(model.read_bytes().replace(SCHEMA_HASH.encode(), b"0123456789abcdef", 1))

    with pytest.raises(SchemaError, match=f"features 0123456789abcdef, this Kairos makes {SCHEMA_HASH}"):
        load(other)


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_model_is_said_to_be_damaged(model: Path, tmp_path: Path, kept: float) -> None:
    short = tmp_path / "short.kairos"
    short.write_bytes(model.read_bytes()[: int(len(model.read_bytes()) * kept)])

    with pytest.raises(InputError, match="damaged"):
        load(short)


def test_a_body_of_something_else_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "odd.kairos"
    path.write_bytes(b"kairos predictors\n" + SCHEMA_HASH.encode() + b"\n" + zlib.compress(b"\x93\x01\x02\x03"))

    with pytest.raises(InputError, match="damaged"):
        load(path)


def test_a_file_that_is_no_model_and_a_path_that_is_no_file_are_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")

    with pytest.raises(InputError, match="is not a Kairos model"):
        load(text)
    with pytest.raises(InputError, match="cannot read the model"):
        load(tmp_path / "missing.kairos")


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the model"):
        save([], tmp_path / "no" / "such" / "folder.kairos")


def _settings(step_times: object) -> Settings:
    shape = {"gpu": "H100-80GB-SXM", "model": "acme/llama-8b", "precision": "bf16", "engine": "vllm-1"}
    profile = ProfileSettings.model_validate({**shape, "step_times": step_times})
    return Settings.model_construct(profiles={"mine": profile})


def test_a_profile_of_the_configuration_takes_its_trained_model(model: Path) -> None:
    times = step_times_of(_settings({"model": str(model)}), "mine")

    assert times.decode_step_s(4, 8000) == load(model).profile(PROFILE).decode_step_s(4, 8000)


def test_a_profile_with_nothing_given_gets_the_roofline(caplog: pytest.LogCaptureFixture) -> None:
    times = step_times_of(_settings(None), "mine")

    assert 0.01 < times.prefill_step_s([Part(4096, 0)]) < 1
    assert "roofline" in caplog.text
