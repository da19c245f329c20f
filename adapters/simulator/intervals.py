"""Intervals for figures of a run whose requests are not independent: time blocks, not requests, are what repeats.

A burst makes neighbouring requests late together, so the unit is a block of time, long enough that one block's queue is
gone before the block after the next begins (where it ever is: see `blocks_of`). Every figure is a ratio of per-block
sums, and one trace is one draw of traffic: an interval speaks of other stretches of this traffic, never of other
traffic.

    20 blocks or more   circular moving-block bootstrap, seeds resampled first, studentised
    10 to 19            t interval on the blocks, seeds summed, widened for what neighbours share (AR(1))
    fewer               none

Seeds replicate the noise and not the workload, so all seeds of a draw see the same resampled stretch of time.

Source: Goetze and Kuensch 1996 (studentised block bootstrap), Owen 2007 (resampling two ways), Woodruff 1952
(quantiles).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from kairos.adapters.simulator.tables import IntArray
from kairos.scheduler_core.slo import FloatArray

LEVEL = 0.95
MIN_BLOCK_S = 60.0
DRAINS_PER_BLOCK = 3.0
MIN_BLOCKS = 10
MIN_BLOCKS_BOOTSTRAP = 20
DRAWS = 2000
MAX_CORRELATION = 0.9
SMALLEST_ERROR_SHARE = 0.25
"""A draw that misses every block that varies has no error of its own; it is given this share of the whole sample's."""


class Interval(NamedTuple):
    """Both ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TimeBlocks:
    """Equal stretches of time that cover a trace's arrivals; a request belongs to the one it arrived in."""

    start_s: float
    block_s: float
    count: int

    def index(self, arrival_s: FloatArray) -> IntArray:
        """The block of each arrival, (n,)."""
        if self.block_s <= 0:
            return np.zeros(len(arrival_s), dtype=np.int64)
        return np.clip((arrival_s - self.start_s) // self.block_s, 0, self.count - 1).astype(np.int64)

    def sums(self, index: IntArray, amount: FloatArray) -> FloatArray:
        """(count,): the amounts of each block's requests."""
        return np.bincount(index, weights=amount, minlength=self.count).astype(np.float64)


def blocks_of(arrival_s: FloatArray, drain_s: float) -> TimeBlocks:
    """As many equal blocks as fit if each lasts at least a minute and three drains, but a tenth of the trace is enough.

    A queue that never drains (arrival order in overload) would leave one block and no interval for any strategy beside
    it; ten blocks that are not independent get the t interval, widened for what neighbours share.

    >>> blocks_of(np.array([0.0, 650.0]), drain_s=5.0)
    TimeBlocks(start_s=0.0, block_s=65.0, count=10)
    """
    if len(arrival_s) == 0:
        return TimeBlocks(0.0, 0.0, 1)
    start_s, span_s = float(np.min(arrival_s)), float(np.ptp(arrival_s))
    wanted_s = max(MIN_BLOCK_S, DRAINS_PER_BLOCK * drain_s)
    count = math.floor(span_s / wanted_s)
    if count < MIN_BLOCKS:
        count = min(MIN_BLOCKS, max(1, math.floor(span_s / MIN_BLOCK_S)))
    return TimeBlocks(start_s, span_s / count, count)


def drains_s(arrival_s: FloatArray, waits_until_s: FloatArray) -> FloatArray:
    """For each arrival: seconds until nobody who is there at that instant waits any more; (n,), arrivals in order.

    >>> drains_s(np.array([0.0, 1.0, 9.0]), np.array([5.0, 2.0, 9.5])).tolist()
    [5.0, 4.0, 0.5]
    """
    return np.maximum(np.maximum.accumulate(waits_until_s) - arrival_s, 0.0)


class BlockSampling:
    """The draws that all figures of one cell share, so that each costs a few matrix products."""

    def __init__(self, seeds: int, blocks: int, random_seed: int = 0) -> None:
        self.blocks = blocks
        self._window = max(1, round(blocks ** (1 / 3)))
        """Neighbouring blocks that are drawn together."""
        rng = np.random.default_rng(random_seed)
        self._seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS).astype(np.float64)
        self._starts = rng.integers(0, blocks, (DRAWS, math.ceil(blocks / self._window)))

    def ratio_interval(self, numerator: FloatArray, denominator: FloatArray) -> Interval | None:
        """The interval of sum(numerator) / sum(denominator); None when fewer than 10 blocks hold anything.

        Args:
            numerator: (seeds, blocks) per-block sums.
            denominator: (seeds, blocks), not negative.
        """
        if np.count_nonzero(denominator.sum(axis=0)) < MIN_BLOCKS:
            return None
        ratio = float(numerator.sum() / denominator.sum())
        if self.blocks < MIN_BLOCKS_BOOTSTRAP:
            half = _t_half_width((numerator - ratio * denominator).sum(axis=0)) / float(denominator.sum())
            return Interval(ratio - half, ratio + half)
        return self._studentised(ratio, numerator, denominator)

    def _studentised(self, ratio: float, numerator: FloatArray, denominator: FloatArray) -> Interval:
        windows = _circular_sums(numerator, self._window), _circular_sums(denominator, self._window)
        misfit = (windows[0] - ratio * windows[1]).sum(axis=0)  # (blocks,)
        error = math.sqrt(self.blocks / self._window * float(np.mean(misfit**2))) / float(denominator.sum())
        if error == 0.0:
            return Interval(ratio, ratio)
        drawn_num, drawn_den = (  # (draws, windows a draw)
            np.take_along_axis(self._seed_weights @ sums, self._starts, axis=1) for sums in windows
        )
        total = drawn_den.sum(axis=1)
        total[total == 0] = np.nan
        ratios = drawn_num.sum(axis=1) / total
        per_draw = drawn_num.shape[1]
        errors = (
            np.sqrt(per_draw / (per_draw - 1) * ((drawn_num - ratios[:, None] * drawn_den) ** 2).sum(axis=1)) / total
        )
        t = (ratios - ratio) / np.maximum(errors, SMALLEST_ERROR_SHARE * error)
        below, above = np.nanquantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(ratio - max(above, 0.0) * error, ratio - min(below, 0.0) * error)


def _circular_sums(per_block: FloatArray, window: int) -> FloatArray:
    """(seeds, blocks): the sum of each block and the `window` - 1 after it, the first following the last."""
    return sum((np.roll(per_block, -shift, axis=1) for shift in range(window)), np.zeros_like(per_block))


def _t_half_width(misfit: FloatArray) -> float:
    """Half the t interval of a sum of k correlated numbers whose mean is 0.

    The lag-1 correlation, with its bias of 1/k taken back and cut to [0, 0.9], says how much fewer they are worth.
    """
    k = len(misfit)
    power = float(misfit @ misfit)
    if power == 0.0:
        return 0.0
    correlation = min(max(float(misfit[:-1] @ misfit[1:]) / power + 1 / k, 0.0), MAX_CORRELATION)
    widening = math.sqrt((1 + correlation) / (1 - correlation))
    return float(stdtrit(k - 1, (1 + LEVEL) / 2)) * math.sqrt(k * power / (k - 1)) * widening


def quantile_interval(shares: Interval, values: NDArray[np.float64]) -> Interval:
    """From an interval of the share of values at or below their quantile to one of the quantile itself (Woodruff)."""
    low, high = np.quantile(values, np.clip(shares, 0.0, 1.0))
    return Interval(float(low), float(high))
