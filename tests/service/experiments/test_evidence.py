"""The evidence is exact: by every coin there is, not by simulation."""

import numpy as np
import pytest
from scipy.special import lambertw

from kairos.scheduler_core.service.experiments.evidence import (
    BETTER_REACH,
    HARM_REACH,
    GaussianMixture,
    SignFlips,
    adjust,
    log_e,
    sigma_of,
)
from kairos.scheduler_core.slo import FloatArray


def all_coins(n: int) -> FloatArray:
    """(2^n, n), each row another way that n coins can fall."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return np.where(bits, -1.0, 1.0)


def bursty_pairs(n: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Unsigned differences and covariates of pairs whose scale drifts and jumps: nothing like independent noise."""
    rng = np.random.default_rng(seed)
    scale = 0.05 * np.exp(np.cumsum(rng.normal(0.0, 0.5, n)))
    x = scale * rng.standard_t(3, n)
    return 0.7 * x + scale * rng.standard_t(3, n), x


@pytest.mark.parametrize("reach", [BETTER_REACH, HARM_REACH])
@pytest.mark.parametrize("sigma", [0.02, 0.07, 0.3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_over_all_coins_the_evidence_is_1_on_average_after_every_pair_with_cuped(
    reach: float, sigma: float, seed: int
) -> None:
    d, x = bursty_pairs(12, seed)
    coins = all_coins(12)

    e = np.exp(log_e(adjust(coins * d, coins * x), sigma, reach))

    assert np.abs(e.mean(axis=0) - 1.0).max() < 1e-9


@pytest.mark.parametrize("reach", [BETTER_REACH, HARM_REACH])
@pytest.mark.parametrize("sigma", [0.005, 0.02])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_over_all_coins_at_most_5_percent_ever_reach_20(reach: float, sigma: float, seed: int) -> None:
    d, x = bursty_pairs(12, seed)
    coins = all_coins(12)

    ever = log_e(adjust(coins * d, coins * x), sigma, reach).max(axis=1) >= np.log(20.0)

    assert 0.0 < ever.mean() <= 0.05


def test_a_slope_fitted_on_all_pairs_would_not_be_exact() -> None:
    # what "from the pairs before" is for: the same pairs, each adjusted with a slope that has seen its coin
    rng = np.random.default_rng(1)
    d, x = rng.normal(0.0, 0.1, 12), rng.normal(0.0, 0.1, 12)
    d, x = all_coins(12) * d, np.broadcast_to(x, (4096, 12))
    slope = (d * x).sum(axis=1, keepdims=True) / (x * x).sum(axis=1, keepdims=True)

    assert abs(np.exp(log_e(d - slope * x, 0.1, HARM_REACH))[:, -1].mean() - 1.0) > 0.01


def test_adjusting_by_hand() -> None:
    # before pair 1 nothing is known; before pair 2: 0.02 / (0.04 + 4 * 0.04 / 1) = 0.1
    assert adjust(np.array([0.1, 0.3]), np.array([0.2, 0.5])) == pytest.approx([0.1, 0.3 - 0.1 * 0.5])


def test_without_a_covariate_nothing_is_adjusted() -> None:
    d = np.array([0.1, -0.2, 0.05])

    assert adjust(d, np.zeros(3)) == pytest.approx(d, abs=0.0)


@pytest.mark.parametrize(("evidence_of", "reach"), [("log_e_better", 1.0), ("log_e_harm", -3.0)])
def test_evidence_of_one_pair_by_hand(evidence_of: str, reach: float) -> None:
    # one difference of one sigma: each bet l gives exp(l)/cosh(l) = 2 / (1 + exp(-2 l))
    bets = 0.1 * (abs(reach) / 0.1) ** (np.arange(8) / 7)

    found = getattr(SignFlips(0.07), evidence_of)(np.array([0.07 * np.sign(reach)]))
    assert found == pytest.approx([np.log(np.mean(2 / (1 + np.exp(-2 * bets))))])


@pytest.mark.parametrize("size", [0.3, 0.05, -0.2])
def test_the_gaussian_mixture_is_the_integral_over_all_bets(size: float) -> None:
    # bets are half-normal with variance 1/eta: the mean of exp(l S - l^2 V / 2)
    d, sigma, alpha = np.full(12, size), 0.2, 0.02
    total, variance = d.sum(), (d * d).sum()
    eta = 40 * sigma**2 / (-lambertw(-(alpha**2) / np.e, -1).real - 1)
    bets = (np.arange(2_000_000) + 0.5) * 1e-5 / np.sqrt(eta)
    density = 2 * np.exp(-(bets**2) * eta / 2) * np.sqrt(eta / (2 * np.pi))
    integral = (density * np.exp(bets * total - bets**2 * variance / 2)).sum() * 1e-5 / np.sqrt(eta)

    assert GaussianMixture(sigma, alpha).log_e_better(d)[-1] == pytest.approx(np.log(integral), abs=1e-6)


def test_huge_differences_do_not_overflow() -> None:
    # each factor tends to exp(x)/cosh(x) = 2
    assert log_e(np.full(10, 1e6), 0.01, 1.0)[-1] == pytest.approx(10 * np.log(2.0))


def test_the_evidence_after_a_restart_is_what_it_was_before() -> None:
    d, x = bursty_pairs(40, seed=5)

    for n in (1, 8, 25):
        assert log_e(adjust(d[:n], x[:n]), 0.07, 1.0) == pytest.approx(log_e(adjust(d, x), 0.07, 1.0)[:n], abs=1e-12)


@pytest.mark.parametrize("evidence", [SignFlips(0.07), GaussianMixture(0.07, 0.02)])
def test_swapping_the_arms_mirrors_the_interval(evidence: SignFlips | GaussianMixture) -> None:
    d, w = 0.05 + bursty_pairs(40, seed=6)[0], np.linspace(0.5, 1.5, 40)

    low, high = evidence.interval(d, w)

    assert evidence.interval(-d, w) == pytest.approx((-high, -low), abs=1e-9)


def test_the_interval_is_the_interval_on_a_grid() -> None:
    d, w = 0.05 + bursty_pairs(30, seed=7)[0], np.linspace(0.5, 1.5, 30)
    grid = np.linspace(-1.0, 1.0, 2001)[:, None]
    against = np.maximum(log_e(d - w * grid, 0.07, 1.0), log_e(w * grid - d, 0.07, 1.0))[:, -1]
    kept = grid[against < np.log(40.0), 0]

    assert SignFlips(0.07).interval(d, w) == pytest.approx((kept[0], kept[-1]), abs=0.001)


def test_the_half_width_at_an_sd_of_10_points_is_about_what_the_tables_say() -> None:
    rng = np.random.default_rng(8)
    widths = {
        n: np.mean([np.diff(SignFlips(0.1).interval(rng.normal(0.0, 0.1, n), np.ones(n))) / 2 for _ in range(40)])
        for n in (20, 40, 80, 200)
    }

    assert widths == pytest.approx({20: 0.077, 40: 0.053, 80: 0.034, 200: 0.022}, rel=0.15)


@pytest.mark.parametrize("evidence", [SignFlips(0.1), GaussianMixture(0.1, 0.02)])
def test_the_interval_holds_the_effect_at_every_look_in_95_of_100_experiments(
    evidence: SignFlips | GaussianMixture,
) -> None:
    rng = np.random.default_rng(9)
    experiments, effect, missed = 200, 0.05, 0
    for _ in range(experiments):
        w = rng.uniform(0.5, 1.5, 60)
        d = w * (effect + 0.1 * rng.standard_t(5, 60))
        looks = [evidence.interval(d[:n], w[:n]) for n in range(8, 61, 4)]
        missed += any(not low <= effect <= high for low, high in looks)

    assert missed <= 0.05 * experiments


def test_no_pairs_say_nothing() -> None:
    nothing = np.zeros(0)

    assert SignFlips(0.1).interval(nothing, nothing) == (-1.0, 1.0)
    assert GaussianMixture(0.1, 0.02).interval(nothing, nothing) == (-1.0, 1.0)


def test_the_gaussian_mixture_rarely_alarms_without_an_effect_and_finds_one() -> None:
    d = np.random.default_rng(10).normal(0.0, 0.1, (2000, 60))
    evidence = GaussianMixture(0.1, 0.02)

    assert (evidence.log_e_better(d).max(axis=1) >= np.log(50.0)).mean() <= 0.02
    assert (evidence.log_e_better(d + 0.1)[:, -1] >= np.log(50.0)).mean() > 0.9
    assert (evidence.log_e_harm(d - 0.1)[:, -1] >= np.log(50.0)).mean() > 0.9


def test_sigma_needs_no_mock_coins_and_has_a_floor() -> None:
    d, x = bursty_pairs(50, seed=11)
    coins = np.where(np.random.default_rng(12).random(50) < 0.5, 1.0, -1.0)

    assert sigma_of(coins * d, coins * x) == pytest.approx(sigma_of(d, x))
    assert sigma_of(np.zeros(5), np.zeros(5)) == 0.005
