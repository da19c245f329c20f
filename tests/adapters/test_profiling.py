"""An engine measured over HTTP: steps of the shape that was asked for, no shorter than they are."""

from pathlib import Path

import pytest
from builders import step_times
from command_line import kairos
from emulated import MODEL, options, run, workers

from kairos.adapters.emulator.gpu import Limits
from kairos.adapters.profiling.engine import EngineProfile, Sweep
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.telemetry import StepRecord

TIMES = step_times(prefill=(0.1, 1e-4, 1e-7), decode=(0.04, 1e-3, 1e-5))


def measured(sweep: Sweep, model: str = MODEL) -> list[StepRecord]:
    limits = Limits(chunk_tokens=200)

    async def work() -> list[StepRecord]:
        async with workers(options(step_times=TIMES, limits=limits)) as [worker]:
            return await EngineProfile(worker.address, model).measure(sweep)

    return run(work(), 60.0)


def test_a_prompt_within_a_chunk_is_a_step_and_a_longer_one_is_a_step_for_each_of_its_chunks() -> None:
    records = measured(Sweep([50, 200, 700], [], [], repeats=3, chunk_tokens=200))

    assert [(r.kind, r.n_requests, r.new_tokens, r.cached_tokens) for r in records] == [
        ("prefill", 1, 50, 0),
        ("prefill", 1, 200, 0),
        ("prefill", 1, 200, 200),
        ("prefill", 1, 200, 400),
    ]


def test_the_pace_of_streams_that_run_together_is_the_step_time_of_their_batch() -> None:
    records = measured(Sweep([], [1, 3], [100], repeats=1, chunk_tokens=200))

    assert [(r.kind, r.batch_size) for r in records] == [("decode", 1), ("decode", 3)]
    assert [100 * r.batch_size < r.sum_context_tokens < 200 * r.batch_size for r in records] == [True, True]
    for record in records:  # an emulated worker catches up with half a second at most
        assert record.step_s > 0.5 * TIMES.decode_step_s(record.batch_size, 100 * record.batch_size)


def test_an_engine_that_refuses_or_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match="answers 404 to a prompt of 16 tokens"):
        measured(Sweep([50], [], []), model="other")
    with pytest.raises(InputError, match="does not answer"):
        run(EngineProfile("http://127.0.0.1:9", MODEL).measure(Sweep([50], [], [])))


@pytest.mark.parametrize("wrong", ["16,x", "", "-1"])
def test_a_list_of_lengths_that_is_none_is_refused(wrong: str, tmp_path: Path) -> None:
    ended = kairos(
        "profile", "engine", "http://127.0.0.1:9", "--model", MODEL, "--gpu", "g", "--prompts", wrong, "--out", tmp_path
    )

    assert ended.code == 2
    assert "write counts with commas" in ended.stderr
