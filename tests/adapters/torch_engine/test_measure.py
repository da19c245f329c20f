"""A model shape is measured into telemetry that predictors learn from."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'kairos-scheduler[torch]'")

from command_line import kairos

from kairos.adapters.telemetry_files import read_telemetry
from kairos.adapters.torch_engine.build import ModelOptions, build
from kairos.adapters.torch_engine.measure import points


def test_only_steps_that_fit_the_slots_are_measured() -> None:
    model = build(ModelOptions("tiny", slots=2, slot_tokens=100))

    told = points(model, [16, 64], [1, 2, 4], [0, 50, 99])

    assert [point[1:] for point in told if not point.decodes] == [(1, 16, 0), (1, 16, 50), (1, 64, 0)]
    assert [point[1:] for point in told if point.decodes] == [(1, 1, 50), (1, 1, 99), (2, 1, 50), (2, 1, 99)]


def test_a_profile_is_telemetry_that_trains_a_model_of_this_device(tmp_path: Path) -> None:
    sweep = ("--new-tokens", "16,32,64,128", "--batches", "1,2,4", "--contexts", "0,64,128", "--repeats", 1)

    profiled = kairos("profile", "torch", "--model", "tiny", *sweep, "--out", tmp_path)
    trained = kairos("train", tmp_path, "--out", tmp_path / "model.kairos")

    read = {steps.kind: steps for steps in read_telemetry([tmp_path]).steps}
    assert (profiled.code, trained.code) == (0, 0), profiled.stderr + trained.stderr
    assert sorted(zip(read["prefill"].new_tokens, read["prefill"].cached_tokens, strict=True)) == [
        (new, cached) for new in (16, 32, 64, 128) for cached in (0, 64, 128)
    ]
    assert sorted(zip(read["decode"].batch_size, read["decode"].sum_context_tokens, strict=True)) == [
        (batch, batch * context) for batch in (1, 2, 4) for context in (64, 128)
    ]
    assert read["decode"].profile.profile_id in trained.stdout
