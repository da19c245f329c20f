"""The learned correction: what log(actual / prior) is across tokens and context, fading to 0 where nothing was seen.

Two ways to learn it: `SmoothResidual` from the few operating points of a grid, `TreeResidual` (LightGBM) from the
thousands of a captured run. Which of them serves, or neither, is decided on held-back operating points by `StepModel`.
"""

from typing import Any, Protocol

import numpy as np

from kairos.predictors.features import graph_batch
from kairos.scheduler_core.slo import FloatArray


class Residual(Protocol):
    """A correction in log space over (u, v): tokens or batch, and attention work or summed context."""

    def fit(self, u: FloatArray, v: FloatArray, log_ratio: FloatArray, weight: FloatArray) -> "Residual":
        """Learns from n steps; all arguments are (n,)."""
        ...

    def predict(self, u: FloatArray, v: FloatArray) -> FloatArray:
        """log(actual / prior) to expect, (n,)."""
        ...


def places(u: FloatArray, v: FloatArray) -> FloatArray:
    """Where a step stands, (n, 2): octaves of tokens (or batch) and of context per token (or request)."""
    return np.stack([np.log2(1 + u), np.log2(1 + v / np.maximum(u, 1))], axis=1)


class SmoothResidual:
    """Kriging between operating points: a Gaussian process with one length scale, in octaves.

    Far from every point it answers 0.
    """

    def __init__(self, octaves: float) -> None:
        self.octaves = octaves

    def fit(self, u: FloatArray, v: FloatArray, log_ratio: FloatArray, weight: FloatArray) -> "SmoothResidual":
        """One centre for each eighth of an octave that was seen, with the median of what was seen there."""
        cells, cell = np.unique(np.round(places(u, v) * 8), axis=0, return_inverse=True)
        order = np.argsort(cell.ravel(), kind="stable")
        groups = np.split(log_ratio[order], np.cumsum(np.bincount(cell.ravel()))[:-1])
        level = np.array([np.median(group) for group in groups])
        if len(cells) > _MOST_CENTRES:
            kept = np.linspace(0, len(cells) - 1, _MOST_CENTRES).astype(np.int64)
            cells, level, groups = cells[kept], level[kept], [groups[k] for k in kept]
        self.centres = cells / 8
        noise = _POINT_NOISE**2 + np.array([_STEP_NOISE**2 / len(group) for group in groups])
        self.pull = np.linalg.solve(self._kernel(self.centres) + np.diag(noise / _SIZE**2), level)
        return self

    def predict(self, u: FloatArray, v: FloatArray) -> FloatArray:
        """log(actual / prior) to expect, (n,)."""
        result: FloatArray = self._kernel(places(u, v)) @ self.pull
        return result

    def _kernel(self, at: FloatArray) -> FloatArray:
        # |a - b|^2 = |a|^2 + |b|^2 - 2 ab: one product instead of an array (n, centres, 2)
        squares = (at**2).sum(axis=1)[:, None] + (self.centres**2).sum(axis=1)[None, :]
        distance = squares - 2 * at @ self.centres.T
        result: FloatArray = np.exp(-distance / (2 * self.octaves**2))
        return result


_MOST_CENTRES = 200
_SIZE = 0.15
"""How far the prior is usually off, and what scatters around a point and from step to step, in log units."""
_POINT_NOISE = 0.03
_STEP_NOISE = 0.1


class TreeResidual:
    """LightGBM on the log ratio, L1 and regularised; outside the range of its training rows it fades to 0."""

    def fit(self, u: FloatArray, v: FloatArray, log_ratio: FloatArray, weight: FloatArray) -> "TreeResidual":
        """Boosts on batch or tokens, its CUDA-graph size, context per request and summed context."""
        import lightgbm  # heavy, and needed for training only

        data = lightgbm.Dataset(self._columns(u, v), log_ratio, weight=weight / weight.mean())
        self.booster = lightgbm.train(_TREES, data, num_boost_round=80)
        at = places(u, v)
        self.low, self.high = at.min(axis=0), at.max(axis=0)
        return self

    def predict(self, u: FloatArray, v: FloatArray) -> FloatArray:
        """log(actual / prior) to expect, (n,)."""
        at = places(u, v)
        outside = np.maximum(np.maximum(self.low - at, at - self.high), 0).sum(axis=1)
        result: FloatArray = self.booster.predict(self._columns(u, v)) * np.exp2(-outside / _FADE_OCTAVES)
        return result

    def _columns(self, u: FloatArray, v: FloatArray) -> FloatArray:
        return np.stack([u, graph_batch(u), v / np.maximum(u, 1), v], axis=1)


_FADE_OCTAVES = 0.25
"""Distance from the training range at which half of the correction is left."""
_TREES: dict[str, Any] = {
    "objective": "regression_l1",
    "learning_rate": 0.1,
    "num_leaves": 15,
    "min_data_in_leaf": 40,
    "lambda_l2": 5.0,
    "feature_fraction": 1.0,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "verbosity": -1,
}
