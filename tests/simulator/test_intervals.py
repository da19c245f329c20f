"""Intervals hold the truth about as often as they say, and know when they cannot."""

import numpy as np
import pytest

from kairos.adapters.simulator.intervals import BlockSampling, Interval, blocks_of, quantile_interval
from kairos.scheduler_core.slo import FloatArray


def autocorrelated_blocks(rng: np.random.Generator, seeds: int, blocks: int, rho: float) -> tuple[FloatArray, ...]:
    """Per-block (met, counted): 200 requests a block, of which the share in time wanders around 0.8."""
    wave = np.empty(blocks)
    wave[0] = rng.normal()
    for i in range(1, blocks):
        wave[i] = rho * wave[i - 1] + np.sqrt(1 - rho**2) * rng.normal()
    counted = np.full((seeds, blocks), 200)
    return rng.binomial(counted, np.clip(0.8 + 0.07 * wave, 0, 1)).astype(float), counted.astype(float)


def coverage(blocks: int, rho: float, seeds: int = 3, trials: int = 300) -> float:
    rng = np.random.default_rng([blocks, round(10 * rho)])
    holds = 0
    for _ in range(trials):
        interval = BlockSampling(seeds, blocks).ratio_interval(*autocorrelated_blocks(rng, seeds, blocks, rho))
        assert interval is not None
        holds += interval.low <= 0.8 <= interval.high
    return holds / trials


@pytest.mark.parametrize(("blocks", "rho"), [(12, 0.0), (12, 0.3), (20, 0.0), (44, 0.0), (44, 0.3), (100, 0.5)])
def test_a_95_percent_interval_holds_the_truth_nearly_as_often_as_it_says(blocks: int, rho: float) -> None:
    assert coverage(blocks, rho) > 0.85


def test_intervals_over_requests_would_hold_it_far_less_often() -> None:
    # what the blocks are for: the same data, each request taken as independent
    rng = np.random.default_rng(5)
    holds = 0
    for _ in range(300):
        met, counted = autocorrelated_blocks(rng, seeds=3, blocks=44, rho=0.3)
        share, n = met.sum() / counted.sum(), counted.sum()
        holds += abs(share - 0.8) <= 1.96 * np.sqrt(share * (1 - share) / n)

    assert holds / 300 < 0.6


def test_fewer_than_ten_blocks_give_no_interval() -> None:
    assert BlockSampling(5, 9).ratio_interval(np.ones((5, 9)), np.ones((5, 9))) is None


def test_blocks_in_which_a_group_never_occurs_do_not_count() -> None:
    counted = np.zeros((1, 40))
    counted[0, :9] = 10.0

    assert BlockSampling(1, 40).ratio_interval(counted / 2, counted) is None


@pytest.mark.parametrize("blocks", [12, 40])
def test_where_nothing_varies_the_interval_is_a_point(blocks: int) -> None:
    counted = np.arange(1.0, blocks + 1)[None, :]

    assert BlockSampling(1, blocks).ratio_interval(counted / 2, counted) == Interval(0.5, 0.5)


@pytest.mark.parametrize("blocks", [12, 40])
def test_an_interval_moves_and_stretches_with_its_numbers(blocks: int) -> None:
    rng = np.random.default_rng(2)
    amount, counted = rng.normal(size=(2, blocks)), rng.uniform(1, 2, size=(2, blocks))
    sampling = BlockSampling(2, blocks)

    plain = sampling.ratio_interval(amount, counted)
    moved = sampling.ratio_interval(3 * amount + 7 * counted, counted)

    assert plain is not None
    assert moved == pytest.approx((3 * plain.low + 7, 3 * plain.high + 7))


def test_the_t_interval_of_ten_independent_blocks_is_the_textbook_one() -> None:
    # alternating values have a negative lag-1 correlation, which never narrows the interval
    values = np.array([[1.0, -1.0] * 5])

    interval = BlockSampling(1, 10).ratio_interval(values, np.ones((1, 10)))

    assert interval == pytest.approx((-0.7541, 0.7541), abs=1e-4)  # 2.2622 * sqrt(10 / 9) / sqrt(10)


def test_each_block_is_at_least_a_minute_and_three_drains_and_all_arrivals_are_in_one() -> None:
    arrival_s = np.linspace(100.0, 1999.0, 500)

    short, long = blocks_of(arrival_s, drain_s=0.0), blocks_of(arrival_s, drain_s=50.0)

    assert (short.count, long.count) == (31, 12)
    assert np.bincount(long.index(arrival_s), minlength=12).min() > 0


def test_an_interval_of_a_share_becomes_one_of_its_quantile() -> None:
    values = np.arange(101.0)

    assert quantile_interval(Interval(0.93, 1.02), values) == pytest.approx((93.0, 100.0))
