"""Whether the errors of a model still are what they were: a CUSUM on block means (docs/lifecycle.md).

Measured by `benchmarks/gate_and_drift.py`. An alarm starts a training; it never promotes.
"""

import math
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from kairos.scheduler_core.slo import FloatArray

BLOCK_ROWS = 200
REFERENCE_BLOCKS = 100
_SURE = 9.0
"""Threshold of one series, in standard deviations; at 8, 6.3 % of 600 made-up series alarmed falsely, at 9, 3.2 %."""

Series = Literal["slower", "faster", "wider"]
SERIES: tuple[Series, ...] = ("slower", "faster", "wider")
"""Mean log error up, down, and mean |log error| up."""


class Alarm(NamedTuple):
    """That errors have changed."""

    series: Series
    since_s: float
    """When the first block began that moved the sum away from 0: about the time of the change."""
    blocks: int
    """Of steps since then."""
    shift: float
    """Mean of the series since then over that of the reference, in log units."""


class Drift(msgspec.Struct):
    """Follows the log errors of one profile and kind, in order of step end; starts anew after an alarm."""

    block: list[tuple[float, float]] = []
    """(log error, |log error|) of the rows of the block that is not full yet."""
    began_s: float = 0.0
    reference: list[tuple[float, float]] = []
    """Their means in each block of the reference."""
    sums: list[float] = msgspec.field(default_factory=lambda: [0.0] * len(SERIES))
    since: list[list[tuple[float, float]]] = msgspec.field(default_factory=lambda: [[] for _ in SERIES])
    """Of each series, the blocks since its sum last stood at 0: mean, and when the block began."""

    def observe(self, log_error: FloatArray, ended_at_s: FloatArray, watched: int) -> Alarm | None:
        """Take n more errors with the times of their steps, each (n,); the latest alarm they give.

        Args:
            watched: how many profiles and kinds are watched together; more of them raise the threshold.
        """
        alarm = None
        for error, at_s in zip(log_error.tolist(), ended_at_s.tolist(), strict=True):
            self.began_s = at_s if not self.block else self.began_s
            self.block.append((error, abs(error)))
            if len(self.block) == BLOCK_ROWS:
                mean, spread = np.mean(self.block, axis=0).tolist()
                self.block = []
                alarm = self._block(mean, spread, watched) or alarm
        return alarm

    def _block(self, mean: float, spread: float, watched: int) -> Alarm | None:
        if len(self.reference) < REFERENCE_BLOCKS:
            self.reference.append((mean, spread))
            return None
        slack = 0.5 + 2 / math.sqrt(len(self.reference))  # the second term pays for the estimated reference
        limit = _SURE + math.log(max(len(SERIES) * watched, 1)) / (2 * slack)
        of_mean, of_spread = (_Usual.of(np.array(column)) for column in zip(*self.reference, strict=True))
        z = (of_mean.z(mean), -of_mean.z(mean), of_spread.z(spread))
        for place, series in enumerate(SERIES):
            self.sums[place] = max(0.0, self.sums[place] + z[place] - slack)
            block = (spread if series == "wider" else mean, self.began_s)
            self.since[place] = [*self.since[place], block] if self.sums[place] else []
            if self.sums[place] > limit:
                usual = of_spread if series == "wider" else of_mean
                means, began_s = zip(*self.since[place], strict=True)
                alarm = Alarm(series, began_s[0], len(means), float(np.mean(means)) - usual.mean)
                self.reference, self.sums, self.since = [], [0.0] * 3, [[], [], []]
                return alarm
        return None


class _Usual(NamedTuple):
    """Mean and standard deviation of the reference's block means, the latter with what their correlation costs."""

    mean: float
    deviation: float

    @staticmethod
    def of(means: FloatArray) -> "_Usual":
        r = min(max(autocorrelation(means), 0.0), 0.9)
        return _Usual(float(means.mean()), max(float(means.std(ddof=1)) * math.sqrt((1 + r) / (1 - r)), 1e-6))

    def z(self, value: float) -> float:
        return (value - self.mean) / self.deviation


def autocorrelation(values: FloatArray) -> float:
    """Of neighbours in a series (n,); 0 where nothing varies.

    >>> autocorrelation(np.array([1.0, -1.0, 1.0, -1.0]))
    -0.75
    """
    centred = values - values.mean()
    total = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / total if total > 0 else 0.0
