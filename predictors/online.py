"""What is learned between trainings: the level of a model's errors, and quantiles that stay calibrated.

Both follow the steps in order of their end. The level is a robust running mean of the log error. The quantiles are
those of the score, log(actual / corrected median), by tracking with an integral term.

Source: Angelopoulos, Barber, Bates 2024, arXiv 2402.01139 (decaying steps); Angelopoulos, Candes, Tibshirani 2023,
arXiv 2307.16895 (integral term).
"""

import math
from bisect import bisect_right
from collections.abc import Mapping

import msgspec
import numpy as np

from kairos.predictors.conformal import UPPER, Interval
from kairos.scheduler_core.domain import Line
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepKind

TERCILES = 3
ENOUGH_ROWS = 300
"""Scored rows from which a load tercile has quantiles of its own."""
COVERAGE_ROWS = 2_000
_COVERAGE_BLOCK = 200
_COVERAGE_OFF = 0.03
_MISS = 1 - UPPER
"""How often a score should lie beyond either quantile."""
_WINDOW, _EVERY = 500, 20
"""Scores whose spread sets the size of a step of the trackers, and rows between two looks at it."""
_SATURATION = 5.0
_FURTHEST = math.log(10.0)
_OUTLIER = math.log(3.0)
"""Scores further out teach the quantiles nothing: stalls, cold kernels."""
_SHARE, _WARM_UP = 0.1, 20
"""Weight of the newest row in the level; the first rows weigh 1 / (n + _WARM_UP), where that is more."""
_SPREAD_SHARE, _SPREAD_FIRST, _REACH = 0.05, 0.25, 1.5
"""The level moves by at most _REACH x the running mean of how far it was off."""


class Correction(msgspec.Struct, frozen=True):
    """Factors on the answers of one kind's model."""

    median: float
    load: tuple[float, float]
    """Between the load terciles: batch size of a decode step, tokens of another."""
    intervals: tuple[Interval, Interval, Interval]
    """Of each tercile, on the corrected median."""

    def bounds(self, load: FloatArray) -> FloatArray:
        """Lower and upper factors (2, n) of steps with these loads (n,)."""
        tercile = np.searchsorted(self.load, load, side="right")
        factors: FloatArray = np.array([[i.lower, i.upper] for i in self.intervals])[tercile].T
        return factors


Corrections = Mapping[StepKind, Correction]
"""By kind of step; a kind that is not there is served as its model says."""


def factor_of(corrections: Corrections, kind: StepKind) -> float:
    """On the medians of a kind."""
    return corrections[kind].median if kind in corrections else 1.0


def scaled_line(line: Line, factor: float) -> Line:
    """`factor` times as long."""
    return Line(*(factor * c for c in line))


class Level(msgspec.Struct):
    """A running mean of log errors that a stall does not move."""

    value: float = 0.0
    rows: int = 0
    spread: float = _SPREAD_FIRST

    def follow(self, log_error: FloatArray) -> FloatArray:
        """The level that held before each of n errors (n,), which are taken in one after the other."""
        value, rows, spread = self.value, self.rows, self.spread
        held = np.empty(len(log_error))
        for place, error in enumerate(log_error.tolist()):
            held[place] = value
            rows += 1
            off, most = error - value, _REACH * spread
            value += max(_SHARE, 1 / (rows + _WARM_UP)) * max(-most, min(most, off))
            spread += _SPREAD_SHARE * (min(abs(off), 4 * spread) - spread)
        self.value, self.rows, self.spread = value, rows, spread
        return held


class Tracker(msgspec.Struct):
    """One quantile of scores: above it lie as many as should."""

    q: float
    rows: int = 0
    excess: float = 0.0
    """Misses beyond what should be, summed."""

    def served(self, scale: float) -> float:
        """The quantile with its integral term, at least 0."""
        n = self.rows
        turn = self.excess * math.log(n + 1) / ((n + 1) * _SATURATION)
        return min(max(self.q + scale * math.tan(min(max(turn, -1.4), 1.4)), 0.0), _FURTHEST)

    def observe(self, score: float, scale: float) -> bool:
        """Take a score in; whether it lay beyond the quantile that held before it."""
        missed = score > self.served(scale)
        self.rows += 1
        self.q += max(0.01, 0.1 * self.rows**-0.6) * scale * (missed - _MISS)
        self.q = min(max(self.q, 0.0), _FURTHEST)
        self.excess += missed - _MISS
        return missed

    def reset(self) -> None:
        """Learn as fast as at first: errors have changed."""
        self.rows, self.excess = 0, 0.0


class Side(msgspec.Struct):
    """The quantile on one side of the median: of all loads, and of each tercile."""

    whole: Tracker
    terciles: list[Tracker]

    @staticmethod
    def at(q: float) -> "Side":
        """Before anything was scored."""
        return Side(Tracker(q), [Tracker(q) for _ in range(TERCILES)])

    def in_force(self, tercile: int) -> Tracker:
        """The one that speaks for a tercile."""
        own = self.terciles[tercile]
        return own if own.rows >= ENOUGH_ROWS else self.whole


class Quantiles(msgspec.Struct):
    """Calibrated quantiles of the scores of one kind of step of one profile."""

    upper: Side
    lower: Side
    """Of scores with the sign turned."""
    load: tuple[float, float] | None = None
    """Between the terciles, as the first rows show them."""
    first: list[tuple[float, float]] = []
    """Load and score of the first ENOUGH_ROWS rows, while the interval of the training holds for all loads."""
    recent: list[float] = []
    """|score| of up to _WINDOW rows."""
    misses: list[tuple[int, int]] = []
    """Below and above the interval, of each of the latest blocks; the last one may not be full yet."""
    block_rows: int = 0

    @staticmethod
    def start(interval: Interval) -> "Quantiles":
        """From the interval that training found."""
        return Quantiles(Side.at(math.log(interval.upper)), Side.at(-math.log(interval.lower)))

    def intervals(self) -> tuple[Interval, Interval, Interval]:
        """What to serve from here on, by load tercile."""
        scale = _scale(self.recent)
        low, middle, high = (
            Interval(
                math.exp(-self.lower.in_force(tercile).served(scale)),
                math.exp(self.upper.in_force(tercile).served(scale)),
            )
            for tercile in range(TERCILES)
        )
        return low, middle, high

    def observe(self, scores: FloatArray, load: FloatArray) -> FloatArray:
        """Take n scores in, in order of the steps' end, with the loads of the steps; each (n,).

        Returns:
            (2, n) what held for each before it was taken in: log factors of the lower and of the upper quantile.
        """
        quantiles = np.empty((2, len(scores)))
        scale = 0.0
        for place, (score, at_load) in enumerate(zip(scores.tolist(), load.tolist(), strict=True)):
            tercile = 0 if self.load is None else bisect_right(self.load, at_load)
            if place % _EVERY == 0:
                scale = _scale(self.recent)
            below, above = self.lower.in_force(tercile).served(scale), self.upper.in_force(tercile).served(scale)
            quantiles[:, place] = -below, above
            if abs(score) <= _OUTLIER:
                for side, signed in ((self.lower, -score), (self.upper, score)):
                    side.whole.observe(signed, scale)
                    if self.load:
                        side.terciles[tercile].observe(signed, scale)
            self._count(-score > below, score > above)
            if self.load is None:
                self._begin(at_load, score)
            self.recent.append(abs(score))
            del self.recent[:-_WINDOW]
        return quantiles

    def coverage_alarm(self) -> tuple[float, float] | None:
        """The shares below and above over the latest 2,000 rows when either is off by over 3 points; counts anew."""
        full = self.misses if self.block_rows == _COVERAGE_BLOCK else self.misses[:-1]
        if len(full) < COVERAGE_ROWS // _COVERAGE_BLOCK:
            return None
        below, above = (float(share) for share in np.sum(full, axis=0) / (len(full) * _COVERAGE_BLOCK))
        if max(abs(below - _MISS), abs(above - _MISS)) <= _COVERAGE_OFF:
            return None
        self.misses, self.block_rows = [], 0
        return below, above

    def reset(self) -> None:
        """Move fast again, after an alarm of the drift test."""
        for side in (self.upper, self.lower):
            for tracker in (side.whole, *side.terciles):
                tracker.reset()

    def _begin(self, load: float, score: float) -> None:
        """Once the first rows are there, start from what they show: a tracker would be long on its way."""
        self.first.append((load, score))
        if len(self.first) < ENOUGH_ROWS:
            return
        loads, scores = np.array(self.first).T
        low, high = np.quantile(loads, [1 / TERCILES, 2 / TERCILES]).tolist()
        self.load, self.first = (low, high), []
        self.lower, self.upper = (Side.at(max(float(np.quantile(s, UPPER)), 0.0)) for s in (-scores, scores))

    def _count(self, below: bool, above: bool) -> None:
        if self.block_rows in (0, _COVERAGE_BLOCK):
            self.misses = [*self.misses, (0, 0)][-1 - COVERAGE_ROWS // _COVERAGE_BLOCK :]
            self.block_rows = 0
        self.block_rows += 1
        was_below, was_above = self.misses[-1]
        self.misses[-1] = was_below + below, was_above + above


class Online(msgspec.Struct):
    """What the steps of one kind and profile taught since their model began to serve."""

    quantiles: Quantiles
    level: Level = msgspec.field(default_factory=Level)

    def observe(self, log_error: FloatArray, load: FloatArray) -> FloatArray:
        """Take n steps in, in order of their end: log(actual / median of the model) and load, each (n,).

        Returns:
            (3, n) what was served for each, as log factors on the model's median: lower quantile, median, upper one.
        """
        held = self.level.follow(log_error)
        lower, upper = self.quantiles.observe(log_error - held, load)
        return np.stack([held + lower, held, held + upper])

    def correction(self) -> Correction:
        """What to serve from here on."""
        return Correction(math.exp(self.level.value), self.quantiles.load or (0.0, 0.0), self.quantiles.intervals())


def _scale(recent: list[float]) -> float:
    """P95 - P50 of the latest |scores|; a middling guess while there are few."""
    if len(recent) < _EVERY:
        return 0.02
    ordered = sorted(recent)
    return max(ordered[int(0.95 * (len(ordered) - 1))] - ordered[len(ordered) // 2], 1e-4)
