"""The question that a live experiment asks a simulator: what would a strategy have made of these arrivals?"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests as they arrived, ascending: n rows, arrays (n,). Nothing in them depends on who decided."""

    arrival_s: FloatArray
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    ttft_target_s: FloatArray
    """inf where there is none."""
    tpot_target_s: FloatArray

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of them in simulation, in their order: arrays (n,)."""

    met: BoolArray
    """Which met their targets."""
    wait_s: FloatArray
    """From arrival until prefill began; inf where it never did."""


class Replay(Protocol):
    """Runs a strategy on arrivals with predicted step times, from an idle fleet: a burn-in is the caller's."""

    def __call__(self, strategy: Strategy, arrivals: Arrivals) -> Replayed:
        """What became of each arrival."""
        ...
