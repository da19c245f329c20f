"""The one feature function, for training and serving, and the hash of its schema.

A prefill, a decode and a mixed step are rows of one table: what a step does not have is 0 in its row.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import PHASES, Steps

FEATURES = (
    "n_requests",
    "new_tokens",
    "attention_work",
    "batch_size",
    "graph_batch",
    "sum_context_tokens",
    "after_context",
    "after_mixed",
    "after_idle",
)
"""Columns of a feature row: prompts in the step; prompt tokens computed; their attention work, sum of new x (context
+ new/2); requests in decode; the CUDA-graph size that they are padded to; the sum of their contexts; and one flag
each for what the engine did just before."""

GRAPH_SIZES = np.array([1, 2, 4, *range(8, 513, 8)], np.float64)
"""Batch sizes that engines capture CUDA graphs for; larger batches run as they are."""

SCHEMA_HASH = hashlib.sha256(f"1 {FEATURES} {GRAPH_SIZES.tolist()}".encode()).hexdigest()[:16]
"""Changes with the meaning of a feature row; a model of another schema is refused."""


def graph_batch(batch_size: FloatArray) -> FloatArray:
    """The CUDA-graph size a decode batch runs at.

    >>> graph_batch(np.array([0.0, 3.0, 17.0, 600.0])).tolist()
    [0.0, 4.0, 24.0, 600.0]
    """
    place = np.searchsorted(GRAPH_SIZES, batch_size)
    padded = np.where(place < len(GRAPH_SIZES), GRAPH_SIZES[np.minimum(place, len(GRAPH_SIZES) - 1)], batch_size)
    return np.where(batch_size > 0, padded, 0.0)


def attention_work(n_requests: ArrayLike, new_tokens: ArrayLike, cached_tokens: ArrayLike) -> FloatArray:
    """Sum of new x (cached + new/2) over equal-sized prompts that add up to these sums.

    >>> float(attention_work(2, 200, 100))
    20000.0
    """
    new = np.asarray(new_tokens, np.float64)
    work: FloatArray = new * (np.asarray(cached_tokens) + new / 2) / np.maximum(np.asarray(n_requests), 1)
    return work


def step_rows(
    *,
    n_requests: ArrayLike = 0.0,
    new_tokens: ArrayLike = 0.0,
    attention_work: ArrayLike = 0.0,
    batch_size: ArrayLike = 0.0,
    sum_context_tokens: ArrayLike = 0.0,
    prev_phase: ArrayLike = 0,
) -> FloatArray:
    """Feature rows (n, len(FEATURES)) of n steps; arguments are numbers or (n,); `prev_phase` as in PHASES."""
    columns = np.broadcast_arrays(n_requests, new_tokens, attention_work, batch_size, sum_context_tokens, prev_phase)
    requests, new, work, batch, context, phase = (np.atleast_1d(c).astype(np.float64) for c in columns)
    after = [(phase == PHASES.index(name)).astype(np.float64) for name in ("context", "mixed", "idle")]
    return np.stack([requests, new, work, batch, graph_batch(batch), context, *after], axis=1)


def rows_of(steps: Steps) -> FloatArray:
    """Feature rows of recorded steps. Records hold sums only, so prompts of one step count as equal-sized."""
    return step_rows(
        n_requests=steps.n_requests,
        new_tokens=steps.new_tokens,
        attention_work=attention_work(steps.n_requests, steps.new_tokens, steps.cached_tokens),
        batch_size=steps.batch_size,
        sum_context_tokens=steps.sum_context_tokens,
        prev_phase=steps.prev_phase,
    )


def column(x: FloatArray, name: str) -> FloatArray:
    """The (n,) column `name` of feature rows."""
    values: FloatArray = x[:, FEATURES.index(name)]
    return values
