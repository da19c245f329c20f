"""What is learned between trainings: levels follow, quantiles stay calibrated, drift is noticed."""

import math
from functools import lru_cache

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_telemetry import PROFILE, decode_s, decode_steps, prefill_steps

from kairos.predictors.artifact import Predictors
from kairos.predictors.checks import check_step_times
from kairos.predictors.conformal import Interval
from kairos.predictors.drift import BLOCK_ROWS, REFERENCE_BLOCKS, Alarm, Drift
from kairos.predictors.features import step_rows
from kairos.predictors.online import Correction, Level, Online, Quantiles
from kairos.predictors.step_time import StepTimePredictor
from kairos.predictors.training import train
from kairos.scheduler_core.domain import Part
from kairos.scheduler_core.slo import FloatArray

REFERENCE_ROWS = BLOCK_ROWS * REFERENCE_BLOCKS


def noise(n: int, seed: int = 0, sigma: float = 0.03) -> FloatArray:
    return sigma * np.random.default_rng(seed).normal(size=n)


def watched(drift: Drift, errors: FloatArray) -> Alarm | None:
    return drift.observe(errors, np.arange(len(errors), dtype=float), 1)


# -- level -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.5, 0.1, -0.3])
def test_the_level_follows_a_model_that_is_off_within_fifty_steps(off: float) -> None:
    held = Level().follow(off + noise(200))

    assert held[0] == 0.0
    assert held[50:].mean() == pytest.approx(off, abs=0.03)


def test_a_single_stall_hardly_moves_the_level() -> None:
    level = Level()
    level.follow(noise(500))
    before = level.value
    level.follow(np.array([math.log(50.0)]))

    assert abs(level.value - before) < 0.01


def test_rows_at_once_are_rows_one_by_one() -> None:
    errors = 0.2 + noise(900)
    load = np.tile([1.0, 8.0, 32.0], 300)
    whole, parts = (Online(Quantiles.start(Interval(0.9, 1.1))) for _ in range(2))
    at_once = whole.observe(errors, load)
    in_parts = [parts.observe(errors[k : k + 20], load[k : k + 20]) for k in range(0, 900, 20)]

    assert np.allclose(at_once, np.concatenate(in_parts, axis=1))
    assert whole.correction() == parts.correction()


# -- quantiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [Interval(0.5, 2.0), Interval(0.999, 1.001)])
def test_quantiles_become_right_whatever_the_training_said(interval: Interval) -> None:
    quantiles = Quantiles.start(interval)
    scores = noise(6_000)
    lower, upper = quantiles.observe(scores, np.tile([1.0, 8.0, 32.0], 2_000))

    assert (scores[1_000:] > upper[1_000:]).mean() == pytest.approx(0.1, abs=0.015)
    assert (scores[1_000:] < lower[1_000:]).mean() == pytest.approx(0.1, abs=0.015)


def test_every_load_has_quantiles_of_its_own() -> None:
    quantiles = Quantiles.start(Interval(0.9, 1.1))
    load = np.random.default_rng(1).uniform(1, 32, 6_000)
    scores = noise(6_000) * np.where(load > 21, 4.0, 1.0)
    quantiles.observe(scores, load)
    low, _, high = quantiles.intervals()

    assert math.log(high.upper) > 2.5 * math.log(low.upper)


def test_stalls_teach_the_quantiles_nothing() -> None:
    plain, stalled = (Quantiles.start(Interval(0.9, 1.1)) for _ in range(2))
    scores = noise(600)
    plain.observe(scores, np.ones(600))
    stalled.observe(scores, np.ones(600))
    stalled.observe(np.full(5, math.log(4.0)), np.ones(5))

    assert stalled.upper.whole.rows == plain.upper.whole.rows


def test_coverage_that_is_off_raises_one_alarm() -> None:
    quantiles = Quantiles.start(Interval(0.9, 1.1))
    quantiles.observe(noise(3_000), np.ones(3_000))
    assert quantiles.coverage_alarm() is None
    quantiles.misses = [(80, 20)] * 10

    assert quantiles.coverage_alarm() == (0.4, 0.1)
    assert quantiles.coverage_alarm() is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=60), st.integers(0, 3))
def test_what_is_served_is_ordered_and_finite_whatever_comes(errors: list[float], seed: int) -> None:
    online = Online(Quantiles.start(Interval(0.9, 1.1)))
    load = np.random.default_rng(seed).uniform(1, 100, len(errors))
    served = online.observe(np.array(errors), load)
    correction = online.correction()

    assert np.isfinite(served).all()
    assert ((served[0] <= served[1]) & (served[1] <= served[2])).all()
    assert all(0.1 - 1e-9 <= i.lower <= 1 <= i.upper <= 10 + 1e-9 for i in correction.intervals)


# -- drift -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "series"), [(0.1, "slower"), (-0.1, "faster")])
def test_a_change_of_ten_percent_is_found_within_ten_blocks(change: float, series: str) -> None:
    drift = Drift()
    assert watched(drift, noise(REFERENCE_ROWS)) is None
    alarm = watched(drift, change + noise(10 * BLOCK_ROWS, seed=1))

    assert alarm is not None
    assert alarm.series == series
    assert alarm.shift == pytest.approx(change, abs=0.01)


def test_errors_that_become_wider_are_found() -> None:
    drift = Drift()
    watched(drift, noise(REFERENCE_ROWS))
    alarm = watched(drift, noise(10 * BLOCK_ROWS, seed=1, sigma=0.06))

    assert alarm is not None
    assert alarm.series == "wider"


def test_an_alarm_says_when_the_change_began() -> None:
    drift = Drift()
    errors = np.concatenate([noise(REFERENCE_ROWS), 0.03 + noise(20 * BLOCK_ROWS, seed=1)])
    alarm = watched(drift, errors)

    assert alarm is not None
    assert REFERENCE_ROWS - 2 * BLOCK_ROWS <= alarm.since_s <= REFERENCE_ROWS + 3 * BLOCK_ROWS


def test_where_nothing_changes_there_is_hardly_ever_an_alarm() -> None:
    rows = REFERENCE_ROWS + 240 * BLOCK_ROWS
    alarms = sum(watched(Drift(), noise(rows, seed)) is not None for seed in range(12))

    assert alarms <= 2  # 5 % each: 3 or more of 12 happen in one run of 50


def test_nothing_is_said_before_the_reference_is_there() -> None:
    drift = Drift()
    watched(drift, noise(REFERENCE_ROWS - 1))

    assert drift.reference[0] != drift.reference[1]
    assert len(drift.reference) == REFERENCE_BLOCKS - 1


def test_a_state_that_was_kept_goes_on_as_if_nothing_had_been() -> None:
    errors = noise(REFERENCE_ROWS + 500)
    whole, kept = Drift(), Drift()
    watched(whole, errors)
    watched(kept, errors[:777])
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(kept), type=Drift)
    watched(kept, errors[777:])

    assert (kept.reference, kept.block, kept.sums) == (whole.reference, whole.block, whole.sums)


# -- served ----------------------------------------------------------------------------------------------------------


@lru_cache
def trained() -> Predictors:
    return Predictors(list(train([prefill_steps(), decode_steps()])))


def corrected(factor: float) -> tuple[StepTimePredictor, StepTimePredictor]:
    """A predictor as trained, and with what was learned since."""
    plain = trained().profile(PROFILE)
    intervals = (Interval(0.9, 1.1), Interval(0.8, 1.2), Interval(0.7, 1.3))
    correction = Correction(factor, (8.0, 20.0), intervals)
    return plain, StepTimePredictor(PROFILE, plain.models, {"decode": correction, "prefill": correction})


def test_a_correction_is_in_every_answer() -> None:
    plain, served = corrected(1.25)

    assert served.decode_step_s(16, 30_000) == pytest.approx(1.25 * decode_s(16, 30_000), rel=0.02)
    assert served.prefill_step_s([Part(1000, 0)]) == pytest.approx(1.25 * plain.prefill_step_s([Part(1000, 0)]))
    assert served.remaining_prefill_s(5000, 0, 2048) == pytest.approx(1.25 * plain.remaining_prefill_s(5000, 0, 2048))
    assert served.prefill_line == pytest.approx([1.25 * c for c in plain.prefill_line])
    assert served.predict_step(batch_size=16, sum_context_tokens=30_000).median_s[0] == pytest.approx(
        served.decode_step_s(16, 30_000)
    )


def test_the_interval_is_that_of_the_load() -> None:
    _, served = corrected(1.0)
    light, middle, heavy = (served.predict(step_rows(batch_size=b, sum_context_tokens=9_000)) for b in (4, 16, 30))

    assert [q.upper_s[0] / q.median_s[0] for q in (light, middle, heavy)] == pytest.approx([1.1, 1.2, 1.3])
    assert [q.lower_s[0] / q.median_s[0] for q in (light, middle, heavy)] == pytest.approx([0.9, 0.8, 0.7])


def test_a_corrected_predictor_keeps_the_contract() -> None:
    check_step_times(corrected(0.8)[1])
