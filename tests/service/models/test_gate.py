"""The gate promotes what is better on later steps, once, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.predictors.step_model import Prediction
from kairos.scheduler_core.service.models.gate import LaterSteps, Verdict, block_mean, decorrelation_rows, judge, look
from kairos.scheduler_core.slo import FloatArray

HOURS_S = 3 * 3600.0
NOISE = 0.03
Z_90 = 1.2816


def later(n: int = 8_000, span_s: float = HOURS_S, seed: int = 0) -> LaterSteps:
    """Steps of one second each, with noise."""
    rng = np.random.default_rng(seed)
    actual_s = np.exp(NOISE * rng.normal(size=n))
    return LaterSteps(actual_s, rng.integers(1, 33, n), 2 ** rng.uniform(7, 13, n), np.linspace(0, span_s, n))


def predicts(n: int = 8_000, off: float = 0.0, scatter: float = 0.0, width: float = 1.0, seed: int = 1) -> Prediction:
    """One second, off by a factor and by errors of its own; its interval as wide as its errors are, times `width`."""
    error = off + scatter * np.random.default_rng(seed).normal(size=n)
    half = width * Z_90 * float(np.hypot(NOISE, scatter))
    return Prediction(np.exp(error - half), np.exp(error), np.exp(error + half))


def verdict(champion: Prediction, challenger: Prediction, first: bool = False) -> Verdict:
    return judge(later(len(champion.median_s)), champion, challenger, first=first)


def test_a_better_challenger_is_promoted() -> None:
    found = verdict(predicts(off=0.1), predicts())

    assert found.word == "promote", found
    assert all(check.passed for check in found.checks.values())


def test_the_same_model_is_kept_out() -> None:
    assert verdict(predicts(), predicts()).word == "keep"


def test_a_model_of_a_shifted_copy_is_refused() -> None:
    found = verdict(predicts(), predicts(off=0.1))

    assert found.word == "keep"
    assert not found.checks["t"].passed
    assert not found.checks["mape_worse"].passed


@pytest.mark.parametrize(("n", "span_s"), [(7_999, HOURS_S), (8_000, 7_199.0), (0, 0.0)])
def test_too_few_rows_or_too_short_a_time_keeps_the_champion_and_the_look(n: int, span_s: float) -> None:
    found = judge(later(n, span_s), predicts(n, off=0.1), predicts(n), first=False)

    assert found.word == "wait"
    assert found.sentence.startswith("not enough later data, champion kept")


def test_a_first_model_needs_fewer_rows_and_a_larger_gain() -> None:
    slightly, much = predicts(2_000, scatter=0.013), predicts(2_000, off=0.1)
    steps = later(2_000, 60.0)

    assert judge(steps, much, predicts(2_000), first=True).word == "promote"
    assert judge(steps, slightly, predicts(2_000), first=True).word == "keep"


def test_rows_that_hang_together_for_too_long_are_not_enough() -> None:
    slow = 0.3 * np.sin(np.arange(8_000) * 2 * np.pi / 8_000)
    wandering = Prediction(np.exp(slow - 0.04), np.exp(slow), np.exp(slow + 0.04))

    assert "decorrelation" in verdict(wandering, predicts()).sentence


def test_a_challenger_with_intervals_that_are_too_narrow_is_refused_for_its_coverage() -> None:
    found = verdict(predicts(off=0.1), predicts(width=0.5))

    assert found.word == "keep"
    assert [name for name, check in found.checks.items() if not check.passed] == [
        "p10_coverage_off",
        "p90_coverage_off",
    ]


def test_a_challenger_that_is_bad_at_high_load_is_refused_for_that_bucket() -> None:
    steps = later()
    heavy = (steps.load > 22) & (steps.tokens_per_request > np.quantile(steps.tokens_per_request, 0.75))
    error = np.where(heavy, 0.12, 0.0)
    challenger = Prediction(*(quantile * np.exp(error) for quantile in predicts()))
    found = look(steps, predicts(off=0.1), challenger, first=False)

    assert not found.checks["worst_bucket_worse"].passed
    assert found.word == "keep"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.05))
def test_of_two_models_never_both_are_promoted_over_the_other(seed: int, scatter: float) -> None:
    one, other = predicts(scatter=scatter, seed=seed), predicts(scatter=0.02, seed=seed + 1)

    assert [verdict(one, other).word, verdict(other, one).word].count("promote") <= 1


def test_refits_of_equal_quality_are_hardly_ever_promoted() -> None:
    rng = np.random.default_rng(0)

    def slow(n: int) -> FloatArray:
        steps = rng.normal(size=n // 50)
        return 0.01 * np.repeat(steps, 50)

    promoted = 0
    for seed in range(60):
        champion, challenger = (predicts(8_000, scatter=0.01, seed=seed + k) for k in (100, 900))
        champion, challenger = (
            Prediction(*(quantile * np.exp(drift) for quantile in model))
            for model, drift in ((champion, slow(8_000)), (challenger, slow(8_000)))
        )
        promoted += look(later(8_000, seed=seed), champion, challenger, first=False).word == "promote"

    assert promoted <= 5  # 2.5 % nominal: 6 or more of 60 happen in one run of 200


def test_the_standard_error_pays_for_the_correlation_of_blocks() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=8_000)
    slow = rows + 3 * np.sin(np.arange(8_000) * 4 * np.pi / 8_000)

    assert block_mean(rows)[1] == pytest.approx(1 / np.sqrt(8_000), rel=0.5)
    assert block_mean(slow)[1] > 20 * block_mean(rows)[1]


def test_the_decorrelation_time_of_an_autoregression_is_found() -> None:
    rng = np.random.default_rng(0)
    series = np.zeros(20_000)
    for k in range(1, len(series)):
        series[k] = 0.9 * series[k - 1] + rng.normal()

    assert decorrelation_rows(series, 1_000) == pytest.approx(np.log(0.1) / np.log(0.9), rel=0.3)
    assert decorrelation_rows(rng.normal(size=1_000), 50) == 1
    assert decorrelation_rows(np.ones(1_000), 50) == 1
