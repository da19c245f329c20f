"""The planner's figures, by hand from docs/statistics.md."""

import math

import pytest
from service.experiments.made_experiments import plan

from kairos.scheduler_core.service.experiments.planner import hours, n50, n80, price, smallest_effect


def test_pairs_to_a_verdict_by_hand() -> None:
    # 2 * (ln 50 + 0.5) = 8.824; at an effect as large as sigma twice that
    assert n50(effect=0.1, sigma=0.1, alpha=0.02) == pytest.approx(17.648, abs=0.001)
    assert n80(effect=0.1, sigma=0.1, alpha=0.02) == pytest.approx(26.472, abs=0.001)


@pytest.mark.parametrize(("sigma", "pairs"), [(0.137, 75), (0.072, 27), (0.116, 56), (0.096, 41), (0.088, 36)])
def test_pairs_at_5_points_for_the_measured_traces(sigma: float, pairs: int) -> None:
    assert round(n50(0.05, sigma, 0.02)) == pairs


def test_the_smallest_effect_is_the_one_that_so_many_pairs_find() -> None:
    assert n80(smallest_effect(120.0, 0.072, 0.02), 0.072, 0.02) == pytest.approx(120.0)


def test_too_few_pairs_find_no_effect() -> None:
    assert smallest_effect(13.0, 0.072, 0.02) == math.inf


def test_a_pair_of_a_switchback_lasts_two_blocks_and_of_pools_one() -> None:
    # n80 at 2 points: 13.236 * (1 + 12.96) = 184.8 pairs
    assert hours(plan(sigma=0.072), 0.02) == pytest.approx(184.8 * 600 / 3600, abs=0.05)
    assert hours(plan("pools", sigma=0.072), 0.02) == pytest.approx(184.8 * 300 / 3600, abs=0.05)


def test_a_large_effect_still_takes_the_pairs_that_better_needs() -> None:
    assert hours(plan(sigma=0.072), 0.5) == pytest.approx(20 * 600 / 3600)


def test_the_price_in_words() -> None:
    assert price(plan(sigma=0.072)) == "5 points: 7 h; 2 points: 31 h; 1 point: 5 days"
