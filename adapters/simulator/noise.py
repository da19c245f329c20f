"""Randomness of a run, each kind from a stream of its own, so that strategies are compared under the same draws."""

from collections.abc import Sequence
from typing import Literal
from zlib import crc32

import numpy as np

from kairos.scheduler_core.domain import Line, Part, StepTimes

Stream = Literal["prefill noise", "prefill error", "decode noise", "decode error"]

_BATCH = 4096


def _generator(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(stream.encode()), index])


def request_factors(seed: int, stream: Stream, sigma: float, n: int) -> list[float]:
    """One lognormal factor of median 1 a request, by its row: the same for every strategy."""
    if sigma == 0:
        return [1.0] * n
    factors: list[float] = _generator(seed, stream).lognormal(0.0, sigma, n).tolist()
    return factors


class StepNoise:
    """Lognormal factors of one instance by step index: paired between strategies only while they step alike."""

    def __init__(self, seed: int, stream: Stream, instance: int, sigma: float) -> None:
        self._sigma = sigma
        self._generator = _generator(seed, stream, instance)
        self._ahead: list[float] = []

    def next(self) -> float:
        """The factor of the next step."""
        if self._sigma == 0:
            return 1.0
        if not self._ahead:
            self._ahead = self._generator.lognormal(0.0, self._sigma, _BATCH).tolist()
            self._ahead.reverse()
        return self._ahead.pop()


class PredictedStepTimes:
    """Decode step times as policies are told them: the real ones times an error that changes with each step."""

    def __init__(self, real: StepTimes, errors: StepNoise) -> None:
        self._real = real
        self._errors = errors
        self._error = 1.0

    def redraw(self) -> None:
        """A new error for the next step."""
        self._error = self._errors.next()

    @property
    def prefill_line(self) -> Line:
        """As it is."""
        return self._real.prefill_line

    @property
    def decode_line(self) -> Line:
        """With the error."""
        return Line(*(self._error * x for x in self._real.decode_line))

    def prefill_step_s(self, parts: Sequence[Part], noise: Sequence[float] | None = None) -> float:
        """As it is: prefill errors are drawn by request."""
        return self._real.prefill_step_s(parts, noise)

    def remaining_prefill_s(self, new_tokens: int, context_tokens: int, chunk_tokens: int | None) -> float:
        """As it is: prefill errors are drawn by request."""
        return self._real.remaining_prefill_s(new_tokens, context_tokens, chunk_tokens)

    def decode_step_s(self, batch_size: int, sum_context_tokens: int) -> float:
        """With the error."""
        return self._error * self._real.decode_step_s(batch_size, sum_context_tokens)
