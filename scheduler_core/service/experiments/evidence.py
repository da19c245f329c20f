"""How strongly paired differences speak for an effect, valid however often one looks.

`d` is one signed difference per coin, challenger minus champion, in the order in which blocks closed: shape (..., n).
With no effect the sign of each difference is a fresh fair coin, whatever the load did: every rule here rests on that.

An e-value is 1 on average with no effect at any time, so it ever exceeds 1/alpha with probability alpha at most.
"""

from typing import Protocol

import msgspec
import numpy as np
from scipy.optimize import brentq
from scipy.special import lambertw, log_ndtr

from kairos.scheduler_core.slo import FloatArray

BETTER_REACH = 1.0
"""Boldest bet for a gain and for the interval, in units of 1/sigma."""
HARM_REACH = 3.0
"""Boldest bet for harm: it acts on a run of equal signs."""
BETS = 8
PSEUDO_PAIRS = 4.0
PLANNED_PAIRS = 40.0
"""Where the Gaussian mixture is sharpest."""
SIGMA_FLOOR = 0.005


def adjust(d: FloatArray, x: FloatArray) -> FloatArray:
    """Differences without what the covariate explains; the slope of each pair comes from the pairs before it.

    Args:
        d: (..., n) differences.
        x: (..., n) the same differences of the covariate; zeros where there is none.
    """
    n = np.arange(1, d.shape[-1] + 1)
    squares = np.cumsum(x * x, axis=-1)
    slope = np.cumsum(d * x, axis=-1) / (squares + PSEUDO_PAIRS * squares / n + 1e-12)
    earlier = np.concatenate([np.zeros_like(slope[..., :1]), slope[..., :-1]], axis=-1)
    return d - earlier * x


def sigma_of(d: FloatArray, x: FloatArray) -> float:
    """Typical size of an adjusted difference on history with the champion alone; what a plan fixes before the start.

    Root mean square: it needs no mock coins, since a coin turns d and x together.
    """
    return max(float(np.sqrt(np.mean(adjust(d, x) ** 2))), SIGMA_FLOOR)


def log_e(d: FloatArray, sigma: float, reach: float) -> FloatArray:
    """Log evidence for "the mean of d is above 0" after each pair, (..., n).

    An equal mixture of the bets prod exp(l d)/cosh(l d) over 8 sizes l between 0.1 and `reach`, over sigma. Its mean is
    exactly 1 while signs are fair coins.

    Source: de la Pena 1999; Howard et al. 2021, arXiv 1810.08240.
    """
    evidence: FloatArray = np.logaddexp.reduce(np.cumsum(_log_factors(d, sigma, reach), axis=-1), axis=-2) - np.log(
        BETS
    )
    return evidence


def _log_factors(d: FloatArray, sigma: float, reach: float) -> FloatArray:
    """(..., bets, n): log of what each bet is multiplied by at each pair; l*d - log cosh(l*d), without overflow."""
    x: FloatArray = np.geomspace(0.1, reach, BETS)[:, None] / sigma * d[..., None, :]
    log_cosh: FloatArray = np.logaddexp(x, -x) - np.log(2.0)
    return x - log_cosh


class Evidence(Protocol):
    """Evidence for and against, after each pair, and the interval after the last."""

    def log_e_better(self, d: FloatArray) -> FloatArray:
        """For a gain, (n,)."""
        ...

    def log_e_harm(self, d: FloatArray) -> FloatArray:
        """For a loss, (n,)."""
        ...

    def interval(self, d: FloatArray, w: FloatArray, level: float = 0.95) -> tuple[float, float]:
        """Effects in [-1, 1] that the differences do not speak against; `w` (n,) are the weights inside `d`."""
        ...


class SignFlips(msgspec.Struct, frozen=True):
    """For designs whose signs are fair coins: `switchback` and `pools`. Exact at any number of pairs."""

    sigma: float

    def log_e_better(self, d: FloatArray) -> FloatArray:
        """For a gain, (..., n)."""
        return log_e(d, self.sigma, BETTER_REACH)

    def log_e_harm(self, d: FloatArray) -> FloatArray:
        """For a loss, (..., n)."""
        return log_e(-d, self.sigma, HARM_REACH)

    def interval(self, d: FloatArray, w: FloatArray, level: float = 0.95) -> tuple[float, float]:
        """Effects in [-1, 1] that neither side's evidence refuses; may be looked at after every pair.

        Evidence against an effect only grows with its distance from the weighted mean, where there is none: so the two
        ends are found by root finding.
        """
        if not w.any():
            return -1.0, 1.0
        threshold = np.log(2.0 / (1.0 - level))
        mean = float(np.clip(d.sum() / w.sum(), -1.0, 1.0))

        def end(limit: float, side: float) -> float:
            def surplus(theta: float) -> float:
                total = _log_factors(side * (d - w * theta), self.sigma, BETTER_REACH).sum(axis=-1)
                return float(np.logaddexp.reduce(total) - np.log(BETS) - threshold)

            if surplus(limit) < 0.0:
                return limit
            return float(brentq(surplus, limit, mean)) if surplus(mean) < 0.0 else mean

        return end(-1.0, 1.0), end(1.0, -1.0)


class GaussianMixture(msgspec.Struct, frozen=True):
    """For `sticky`, where shares other than a half leave signs unfair. Exact under symmetry, else for many blocks.

    Source: Howard et al. 2021, arXiv 1810.08240, the one-sided normal mixture with its own variance.
    """

    sigma: float
    alpha: float

    def log_e_better(self, d: FloatArray) -> FloatArray:
        """For a gain, (..., n)."""
        return self._log_e(np.cumsum(d, axis=-1), np.cumsum(d * d, axis=-1))

    def log_e_harm(self, d: FloatArray) -> FloatArray:
        """For a loss, (..., n)."""
        return self.log_e_better(-d)

    def interval(self, d: FloatArray, w: FloatArray, level: float = 0.95) -> tuple[float, float]:
        """Hull of the effects in [-1, 1], to 0.001, that neither side's evidence refuses."""
        theta = np.linspace(-1.0, 1.0, 2001)
        total = d.sum() - theta * w.sum()
        variance = (d * d).sum() - 2 * theta * (d * w).sum() + theta**2 * (w * w).sum()
        against = np.maximum(self._log_e(total, variance), self._log_e(-total, variance))
        mean = np.clip(d.sum() / max(w.sum(), 1e-12), -1.0, 1.0)
        kept = np.append(theta[against < np.log(2.0 / (1.0 - level))], mean)
        return float(kept.min()), float(kept.max())

    def _log_e(self, total: FloatArray, variance: FloatArray) -> FloatArray:
        eta = PLANNED_PAIRS * self.sigma**2 / float(-lambertw(-(self.alpha**2) / np.e, -1).real - 1.0)
        spread = variance + eta
        answer: FloatArray = (
            np.log(2.0) + 0.5 * np.log(eta / spread) + total**2 / (2 * spread) + log_ndtr(total / np.sqrt(spread))
        )
        return answer
