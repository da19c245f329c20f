"""Calibrated quantiles: split conformal on log errors of steps that the model had not seen."""

import msgspec
import numpy as np

from kairos.scheduler_core.slo import FloatArray

LOWER, UPPER = 0.1, 0.9
"""The two quantiles that stand beside every median."""


class Interval(msgspec.Struct, frozen=True):
    """Factors on the median: 0 < lower <= 1 <= upper."""

    lower: float
    upper: float


def split_conformal(log_error: FloatArray) -> Interval:
    """The interval that held-back log(actual / predicted), (n,), call for.

    Of n held-back steps the ceil((n + 1) q)-th counts, so that a fresh one falls below it at least as often as q says.

    Source: Lei et al. 2018, Distribution-free predictive inference for regression, section 2.2.

    >>> split_conformal(np.log(np.array([0.9, 1.0, 1.0, 1.2])))
    Interval(lower=0.9, upper=1.2)
    """
    ordered = np.sort(log_error)
    n = len(ordered)
    if n == 0:
        return Interval(1.0, 1.0)
    low = ordered[max(int(np.floor((n + 1) * LOWER)), 1) - 1]
    high = ordered[min(int(np.ceil((n + 1) * UPPER)), n) - 1]
    return Interval(round(float(np.exp(min(low, 0.0))), 12), round(float(np.exp(max(high, 0.0))), 12))
