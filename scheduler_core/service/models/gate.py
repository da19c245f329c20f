"""The gate: whether a challenger predicts later steps better than the champion, by one look (docs/lifecycle.md).

Measured by `benchmarks/gate_and_drift.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from kairos.predictors.conformal import LOWER, UPPER
from kairos.predictors.drift import autocorrelation
from kairos.predictors.evaluate import pinball_losses
from kairos.predictors.step_model import Prediction
from kairos.scheduler_core.slo import FloatArray

BLOCKS = 16
ENOUGH_ROWS, ENOUGH_S = 8_000, 7_200.0
FIRST_ROWS = 2_000
"""What is enough for a first model against the prior."""
_GAIN, _FIRST_GAIN = 0.01, 0.10
_MAPE_WORSE = 0.005
_COVERAGE_OFF = 0.03
_BUCKET_ROWS, _BUCKET_WORSE = 500, 0.05
_DECORRELATED, _DECORRELATION_TIMES = 0.1, 20
_T_975_15 = 2.131449545559323
"""Of Student's t with 15 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class LaterSteps:
    """Steps that the challenger was not trained on, in order of their end; each (n,)."""

    actual_s: FloatArray
    load: FloatArray
    """Batch size of a decode step, tokens of another."""
    tokens_per_request: FloatArray
    ended_at_s: FloatArray


class Check(msgspec.Struct, frozen=True):
    """One condition."""

    value: float
    limit: float
    passed: bool


class Verdict(msgspec.Struct, frozen=True):
    """What the look said."""

    word: Literal["promote", "keep", "wait"]
    """`wait`: not enough later data, the champion is kept and the look is still to come."""
    sentence: str
    rows: int
    checks: dict[str, Check] = {}


def enough(rows: int, span_s: float, *, first: bool) -> bool:
    """Whether so many later rows over so long a time are worth the one look."""
    return rows >= FIRST_ROWS if first else rows >= ENOUGH_ROWS and span_s >= ENOUGH_S


def judge(steps: LaterSteps, champion: Prediction, challenger: Prediction, *, first: bool) -> Verdict:
    """The verdict on a challenger that predicts the same n steps as the champion.

    Args:
        first: the champion is the prior; fewer rows are enough, and the gain must be larger.
    """
    n = len(steps.actual_s)
    span_s = float(np.ptp(steps.ended_at_s)) if n else 0.0
    if not enough(n, span_s, first=first):
        return _wait(n, f"{n} later rows over {span_s / 3600:.1f} h")
    return look(steps, champion, challenger, first=first)


def look(steps: LaterSteps, champion: Prediction, challenger: Prediction, *, first: bool) -> Verdict:
    """The test behind `judge`, on however many steps there are."""
    n = len(steps.actual_s)
    loss, challenger_loss = (pinball_losses(steps.actual_s, p) for p in (champion, challenger))
    gain = loss - challenger_loss
    # against the prior the gain hangs on the operating point, which changes slowly: there it has to be large instead
    if not first and decorrelation_rows(gain, n // _DECORRELATION_TIMES) is None:
        return _wait(n, f"{n} later rows are fewer than {_DECORRELATION_TIMES} decorrelation times")
    ape, challenger_ape = (np.abs(p.median_s / steps.actual_s - 1) for p in (champion, challenger))
    mean, error = block_mean(gain)
    ape_mean, ape_error = block_mean(challenger_ape - ape)
    below, above = (
        abs(float((steps.actual_s <= quantile_s).mean()) - level)
        for level, quantile_s in ((LOWER, challenger.lower_s), (UPPER, challenger.upper_s))
    )
    least_gain = _FIRST_GAIN if first else _GAIN
    share = mean / float(loss.mean())
    mape = ape_mean + _T_975_15 * ape_error
    bucket = _worst_bucket(steps, loss, challenger_loss)
    t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    checks = {
        "t": Check(min(max(t, -1e9), 1e9), _T_975_15, t > _T_975_15),
        "gain_share": Check(share, least_gain, share >= least_gain),
        "mape_worse": Check(mape, _MAPE_WORSE, mape <= _MAPE_WORSE),
        "p10_coverage_off": Check(below, _COVERAGE_OFF, below <= _COVERAGE_OFF),
        "p90_coverage_off": Check(above, _COVERAGE_OFF, above <= _COVERAGE_OFF),
        "worst_bucket_worse": Check(bucket, _BUCKET_WORSE, bucket <= _BUCKET_WORSE),
    }
    failed = [name for name, check in checks.items() if not check.passed]
    if failed:
        first_failed = checks[failed[0]]
        why = f"{failed[0]} is {first_failed.value:.3g}, the limit {first_failed.limit:.3g}"
        return Verdict("keep", f"champion kept: {why} ({n} later rows)", n, checks)
    return Verdict("promote", f"better by {share:.1%} of the champion's loss on {n} later rows", n, checks)


def block_mean(values: FloatArray) -> tuple[float, float]:
    """Mean over 16 consecutive blocks of (n,) values, and its standard error with what their correlation costs."""
    means = np.array([block.mean() for block in np.array_split(values, BLOCKS)])
    r = min(max(autocorrelation(means) + 1 / BLOCKS, 0.0), 0.9)
    return float(means.mean()), float(means.std(ddof=1)) / math.sqrt(BLOCKS) * math.sqrt((1 + r) / (1 - r))


def decorrelation_rows(values: FloatArray, most: int) -> int | None:
    """The first lag at which the autocorrelation of (n,) values is below 0.1; None: none up to `most`."""
    centred = values - values.mean()
    if not centred.any():
        return 1
    size = 2 ** math.ceil(math.log2(2 * len(values)))
    power = np.abs(np.fft.rfft(centred, size)) ** 2
    correlation = np.fft.irfft(power, size)[: most + 1]
    low = np.flatnonzero(correlation[1:] < _DECORRELATED * correlation[0])
    return int(low[0]) + 1 if len(low) else None


def _worst_bucket(steps: LaterSteps, loss: FloatArray, challenger_loss: FloatArray) -> float:
    """By what share the challenger loses most, over load terciles x quartiles of tokens per request."""
    load = np.searchsorted(np.quantile(steps.load, [1 / 3, 2 / 3]), steps.load, side="left")
    prompt = np.searchsorted(np.quantile(steps.tokens_per_request, [0.25, 0.5, 0.75]), steps.tokens_per_request)
    bucket = load * 4 + prompt
    rows, theirs, ours = (np.bincount(bucket, weights, 12) for weights in (None, loss, challenger_loss))
    full = rows >= _BUCKET_ROWS
    return float((ours[full] / theirs[full] - 1).max()) if full.any() else 0.0


def _wait(rows: int, found: str) -> Verdict:
    return Verdict("wait", f"not enough later data, champion kept: {found}", rows)
