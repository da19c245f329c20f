"""The physical prior: non-negative least squares on what a step has to do.

Non-negative coefficients of non-decreasing terms: the prior never falls when tokens, batch or context grow, and it
goes on as a straight line beyond what was seen. The fit minimises |log(predicted / actual)| by reweighting, so that a
few impossible rows do not bend it and short steps count as much as long ones.
"""

import msgspec
import numpy as np

from kairos.predictors.features import GRAPH_SIZES, column
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepKind

TOKEN_KNOTS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens of a step where the cost per token may change: GEMMs saturate, experts fill up, the launch floor ends."""
BATCH_KNOTS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)
"""CUDA-graph sizes above which a decode step may cost a fixed amount more."""

_ROUNDS = 12
_FLAT = 0.03
"""Log errors below this share one weight (a Huber loss): the noise of a step."""


def terms(kind: StepKind, x: FloatArray) -> tuple[FloatArray, int]:
    """What the step time is a sum of, (n, k), and how many of the first columns are always free.

    The rest bend the line and are held small by a ridge: knots in tokens for prefill and mixed steps, CUDA-graph
    sizes for decode steps.
    """
    one = np.ones(len(x))
    batch, context = column(x, "batch_size"), column(x, "sum_context_tokens")
    if kind == "decode":
        padded = column(x, "graph_batch")
        free = [one, batch, padded, context]
        free += [column(x, name) for name in ("after_context", "after_mixed", "after_idle")]
        bends = [(padded > knot).astype(np.float64) for knot in BATCH_KNOTS]
    else:
        tokens = column(x, "new_tokens") + batch
        further = np.maximum(column(x, "n_requests") - 1, 0)
        free = [one, tokens, column(x, "attention_work"), further, context, column(x, "after_idle")]
        bends = [np.maximum(tokens - knot, 0) for knot in TOKEN_KNOTS]
        bends += [np.minimum(tokens, knot) for knot in TOKEN_KNOTS]
        bends.append((tokens > GRAPH_SIZES[-1]).astype(np.float64))
    return np.stack(free + bends, axis=1), len(free)


class Prior(msgspec.Struct, frozen=True):
    """Step seconds as a non-negative sum of physical terms."""

    kind: StepKind
    coefficients: list[float]

    def predict(self, x: FloatArray) -> FloatArray:
        """Seconds (n,) of feature rows (n, len(FEATURES)); positive."""
        seconds: FloatArray = terms(self.kind, x)[0] @ np.array(self.coefficients)
        return np.maximum(seconds, 1e-6)


def fit_prior(kind: StepKind, x: FloatArray, step_s: FloatArray, weight: FloatArray, ridge: float) -> Prior:
    """The prior of rows (n, len(FEATURES)) that took step_s (n,), each counted `weight` (n,) times.

    `ridge`: how much bending costs; infinity = a straight line.
    """
    matrix, free = terms(kind, x)
    return Prior(kind, fit_nonnegative(matrix, free, step_s, weight, ridge).tolist())


def fit_nonnegative(
    matrix: FloatArray, free: int, step_s: FloatArray, weight: FloatArray, ridge: float = np.inf
) -> FloatArray:
    """Coefficients (k,) >= 0 of the terms (n, k) that come nearest to step_s (n,) in |log error|.

    The columns from `free` on are held small by `ridge`; infinity leaves them out.
    """
    from scipy.optimize import nnls  # training only: an engine that predicts needs no scipy

    if np.isinf(ridge):
        used = matrix[:, :free]
        bends = np.zeros((0, free))
    else:
        used = matrix
        bends = np.eye(matrix.shape[1])[free:] * np.sqrt(ridge * len(matrix))
    weight = weight * len(weight) / weight.sum()
    coefficients = np.zeros(matrix.shape[1])
    # in the first round an impossibly short step must not outweigh all others
    row_weight = np.sqrt(weight) / (step_s + np.median(step_s))
    for _ in range(_ROUNDS):
        rows = used * row_weight[:, None]
        scale = np.sqrt(np.mean(rows**2, axis=0))
        scale[scale == 0] = np.inf
        target = np.concatenate([step_s * row_weight, np.zeros(len(bends))])
        scaled, _ = nnls(np.concatenate([rows / scale, bends]), target, maxiter=100 * used.shape[1])
        coefficients[: used.shape[1]] = scaled / scale
        predicted = np.maximum(matrix @ coefficients, 1e-6)
        log_error = np.log(predicted / step_s)
        # (predicted - actual) / logarithmic mean is the log error: least squares in log space, then towards L1
        even = np.abs(log_error) < 1e-6
        mean_s = np.where(even, step_s, (predicted - step_s) / np.where(even, 1.0, log_error))
        row_weight = np.sqrt(weight * _FLAT / np.maximum(np.abs(log_error), _FLAT)) / mean_s
    return coefficients
