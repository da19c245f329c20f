"""What a promise means in numbers: deadlines, lost, met, attainment. Defined here and nowhere else.

All times are seconds on one clock. Functions take numbers or NumPy arrays alike unless they say otherwise.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Seconds = TypeVar("Seconds", float, FloatArray)

NO_TARGET_S = float("inf")
"""A target that nothing can miss: what a request without a target carries."""


def ttft_deadline_s(arrival_s: float, ttft_target_s: float) -> float:
    """When the first token is due."""
    return arrival_s + ttft_target_s


def token_deadline_s(first_token_s: float, tpot_target_s: float, k: int) -> float:
    """When the k-th token after the first is due; k = 0 is the first token itself.

    >>> token_deadline_s(first_token_s=2.0, tpot_target_s=0.05, k=10)
    2.5
    """
    return first_token_s + k * tpot_target_s


def is_lost(now_s: float, remaining_prefill_s: float, deadline_s: float) -> bool:
    """Whether the first token comes late even if nothing else runs from now on.

    >>> is_lost(now_s=1.0, remaining_prefill_s=1.0, deadline_s=2.0)
    False
    """
    return now_s + remaining_prefill_s > deadline_s


def tpot_s(first_token_s: Seconds, last_token_s: Seconds, output_tokens: Seconds) -> Seconds:
    """Mean time per output token after the first; only for more than one output token.

    >>> tpot_s(1.0, 3.0, 5)
    0.5
    """
    return (last_token_s - first_token_s) / (output_tokens - 1)


def ttft_met(ttft_s: FloatArray, ttft_target_s: FloatArray) -> BoolArray:
    """Which first tokens were in time; NaN (no first token) is a miss."""
    return ttft_s <= ttft_target_s


def tpot_met(tpot: FloatArray, tpot_target_s: FloatArray, output_tokens: FloatArray, finished: BoolArray) -> BoolArray:
    """Which requests kept their TPOT target; a finished request with a single token has none to miss."""
    return finished & ((output_tokens <= 1) | (tpot <= tpot_target_s))


def attainment(met: BoolArray) -> float:
    """Share of all submitted requests that met the target; NaN when nothing was submitted.

    >>> attainment(np.array([True, True, False, True]))
    0.75
    """
    return float(np.mean(met)) if met.size else float("nan")


def goodput_per_s(met: BoolArray, span_s: float) -> float:
    """Requests per second that met all their targets."""
    return float(np.sum(met)) / span_s if span_s > 0 else float("nan")
