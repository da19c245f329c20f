"""What a trained predictor must be: right on steps it has not seen, monotone, the same alone and in bulk."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_telemetry import PROFILE, decode_s, decode_steps, prefill_s, prefill_steps

from kairos.predictors.artifact import Predictors
from kairos.predictors.checks import check_predictor, check_step_times
from kairos.predictors.features import step_rows
from kairos.predictors.prior import fit_prior
from kairos.predictors.step_model import StepRegressor
from kairos.predictors.step_time import StepTimePredictor
from kairos.predictors.surface import Surface
from kairos.predictors.training import operating_points, train, training_rows
from kairos.scheduler_core.domain import Line, LinearStepTimes, Part, Profile
from kairos.scheduler_core.errors import TelemetryError, UnknownProfileError


@lru_cache
def predictors() -> Predictors:
    return Predictors(list(train([prefill_steps(), decode_steps()])))


def predictor() -> StepTimePredictor:
    return predictors().profile(PROFILE)


def test_the_trained_predictor_keeps_the_contract() -> None:
    check_predictor(predictor())


def test_linear_step_times_keep_the_contract() -> None:
    check_step_times(LinearStepTimes(prefill=Line(0.0082, 1.48e-5, 3.9e-10), decode=Line(0.0059, 3.1e-5, 1e-8)))


@pytest.mark.parametrize(("batch", "context"), [(1, 500), (7, 20_000), (16, 30_000), (17, 30_000), (32, 100_000)])
def test_a_decode_step_is_predicted_within_two_percent(batch: int, context: int) -> None:
    assert predictor().decode_step_s(batch, context) == pytest.approx(decode_s(batch, context), rel=0.02)


@pytest.mark.parametrize(("new", "context"), [(150, 0), (1000, 0), (1000, 3000), (6000, 0)])
def test_a_prefill_step_is_predicted_within_three_percent(new: int, context: int) -> None:
    assert predictor().prefill_step_s([Part(new, context)]) == pytest.approx(prefill_s(new, context), rel=0.03)


def test_contexts_and_prompts_beyond_the_training_range_follow_the_prior() -> None:
    assert predictor().decode_step_s(32, 1_000_000) == pytest.approx(decode_s(32, 1_000_000), rel=0.05)
    assert predictor().remaining_prefill_s(60_000, 0, 4096) == pytest.approx(
        sum(prefill_s(min(4096, 60_000 - at), at) for at in range(0, 60_000, 4096)), rel=0.08
    )


def test_noise_on_one_part_counts_by_its_share_of_the_work() -> None:
    parts = [Part(1000, 0), Part(1000, 0)]
    plain_s = predictor().prefill_step_s(parts)
    second = predictor().prefill_step_s(parts, [1.0, 2.0])
    a_s, b_s, c_s = predictor().prefill_line
    share = (b_s * 1000 + c_s * 1000 * 500) / (a_s + 2 * (b_s * 1000 + c_s * 1000 * 500))

    assert second == pytest.approx(plain_s * (1 + share))


def test_the_lines_are_the_ones_behind_the_telemetry() -> None:
    prefill, decode = predictor().prefill_line, predictor().decode_line

    assert prefill == pytest.approx((1e-2, 2e-5, 1e-9), rel=0.25)
    assert decode.a_s == pytest.approx(5e-3, rel=0.1)
    assert decode.c_s == pytest.approx(3e-8, rel=0.1)


def test_the_upper_quantile_covers_nine_steps_of_ten() -> None:
    fresh = decode_steps(seed=7)
    x = training_rows({"decode": fresh}, "decode")[0]
    covered = np.mean(fresh.step_s <= predictor().predict(x).upper_s)

    assert 0.85 <= covered <= 0.96


def test_training_twice_gives_the_same_numbers() -> None:
    again = Predictors(list(train([prefill_steps(), decode_steps()]))).profile(PROFILE)

    assert again.models == predictor().models


def test_a_few_impossible_steps_do_not_bend_the_prior() -> None:
    steps = decode_steps()
    x, seconds, _ = training_rows({"decode": steps}, "decode")
    seconds = seconds.copy()
    seconds[::40] /= 50
    prior = fit_prior("decode", x, seconds, np.ones(len(x)), np.inf)

    assert np.median(np.abs(prior.predict(x) / steps.step_s - 1)) < 0.03


def test_a_curve_that_the_prior_has_no_term_for_is_learned_by_the_residual() -> None:
    steps = decode_steps()
    x, seconds, points = training_rows({"decode": steps}, "decode")
    octaves_above = np.log2(steps.sum_context_tokens) - 15
    bent = seconds * (1 + 0.4 / (1 + np.exp(-4 * octaves_above)))
    model = StepRegressor("decode").fit(x, bent, points).model_
    error, prior_error = (np.abs(p / bent - 1) for p in (model.predict(x).median_s, model.prior.predict(x)))

    assert "prior x" in model.source
    assert np.median(error) < 0.8 * np.median(prior_error)


def test_noise_alone_switches_no_residual_on() -> None:
    steps = decode_steps(noise=0.2)
    x, seconds, points = training_rows({"decode": steps}, "decode")

    assert StepRegressor("decode").fit(x, seconds, points).model_.source == "800 measured decode steps, prior"


def test_a_single_operating_point_is_enough_to_predict_it() -> None:
    steps = decode_steps().take(np.zeros(5, np.int64))
    x, seconds, points = training_rows({"decode": steps}, "decode")
    model = StepRegressor("decode").fit(x, seconds, points).model_

    assert model.predict(x).median_s[0] == pytest.approx(seconds[0], rel=1e-6)
    assert model.held_back.median_ape is None


def test_an_operating_point_is_never_split_between_phases_runs_or_half_octaves() -> None:
    steps = decode_steps()
    points = operating_points(steps)
    for point in np.unique(points):
        inside = steps.take(points == point)
        assert len(set(inside.batch_size)) == 1
        assert len(set(np.floor(2 * np.log2(inside.sum_context_tokens)))) == 1


def test_learning_a_kind_without_a_row_of_it_is_an_error() -> None:
    x = step_rows(batch_size=1, sum_context_tokens=10)
    with pytest.raises(TelemetryError, match="no prefill step"):
        StepRegressor("prefill").fit(x, np.array([0.01]))


def test_the_estimator_keeps_scikit_learn_s_conventions() -> None:
    sklearn_base = pytest.importorskip("sklearn.base")
    estimator = StepRegressor("prefill", residuals=("trees",))
    twin = sklearn_base.clone(estimator)

    assert twin.get_params() == estimator.get_params()
    with pytest.raises(ValueError, match="no parameter 'depth'"):
        estimator.set_params(depth=3)


# -- profiles that lack something ------------------------------------------------------------------------------------


def test_a_kind_that_was_not_measured_comes_from_the_closest_profile_and_says_so() -> None:
    twice = Profile("H100-80GB-SXM", "acme/llama-8b", "bf16", 2, 1, "vllm-1")
    found = Predictors(list(train([prefill_steps(), decode_steps(), decode_steps(twice, factor=0.6)]))).profile(twice)

    assert found.models["decode"].source.startswith("800 measured decode steps")
    assert f"closest profile {PROFILE.profile_id}, scaled by" in found.models["prefill"].source
    assert found.is_borrowed
    check_predictor(found)


def test_an_unknown_profile_is_scaled_by_hardware_from_the_closest() -> None:
    faster = predictors().profile("b300-sxm6_acme-llama-8b_bf16_1_1_vllm-1")

    assert PROFILE.profile_id in faster.source
    assert faster.prefill_step_s([Part(4096, 0)]) < predictor().prefill_step_s([Part(4096, 0)])


def test_with_no_telemetry_at_all_of_a_kind_the_roofline_answers_and_says_so() -> None:
    found = Predictors(list(train([decode_steps()]))).profile(PROFILE)

    assert "bandwidth, FLOPs and model size" in found.models["prefill"].source
    check_predictor(found)


def test_an_id_that_is_no_profile_is_refused_with_what_is_near() -> None:
    with pytest.raises(UnknownProfileError, match="unknown profile 'nonsense'"):
        predictors().profile("nonsense")


# -- always ----------------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3000), more=st.integers(0, 3000), context=st.integers(0, 10**8), further=st.integers(0, 10**8)
)
@settings(max_examples=200, deadline=None)
def test_decode_never_gets_shorter_with_batch_or_context(batch: int, more: int, context: int, further: int) -> None:
    seconds = predictor().decode_step_s(batch, context)

    assert 0 < seconds <= predictor().decode_step_s(batch + more, context + further) * (1 + 1e-12)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_prefill_never_gets_shorter_with_tokens_or_context(new: int, more: int, context: int, further: int) -> None:
    seconds = predictor().prefill_step_s([Part(new, context)])

    assert 0 < seconds <= predictor().prefill_step_s([Part(new + more, context + further)]) * (1 + 1e-12)


@given(st.lists(st.floats(0.01, 10), min_size=9, max_size=9), st.floats(0, 9), st.floats(0, 9), st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_a_surface_is_monotone_whatever_it_is_built_from(levels: list[float], u: float, v: float, more: float) -> None:
    nodes = np.array([1.0, 2.0, 5.0])
    surface = Surface.of(lambda a, b: np.array(levels), nodes, nodes)

    assert surface.at(u, v) <= surface.at(u + more, v) + 1e-9
    assert surface.at(u, v) <= surface.at(u, v + more) + 1e-9
    assert surface.batch(np.array([u]), np.array([v]))[0] == pytest.approx(surface.at(u, v))
