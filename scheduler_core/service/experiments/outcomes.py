"""Requests with what became of them, as arrays: what blocks and pairs are made of."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kairos.scheduler_core.replay import Arrivals
from kairos.scheduler_core.slo import BoolArray, FloatArray, ttft_met
from kairos.scheduler_core.telemetry import REQUEST_STATUSES, IntArray

FINISHED, FAILED = REQUEST_STATUSES.index("finished"), REQUEST_STATUSES.index("failed")
TENANT_GROUPS = 8
"""Tenants are told apart by so many groups, so that no record of an experiment names one."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """n requests in order of arrival, each array (n,)."""

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    """0: not known."""
    status: IntArray
    """Place in REQUEST_STATUSES."""
    ttft_s: FloatArray
    """NaN, as all below: not recorded."""
    tpot_s: FloatArray
    wait_s: FloatArray
    ttft_target_s: FloatArray
    """inf: none."""
    tpot_target_s: FloatArray
    pool: IntArray
    """-1: not told."""
    tenant_group: IntArray
    """0 to 7; -1: not told."""
    strategy: NDArray[np.object_]
    """name@version; empty, as both below: not told."""
    session: NDArray[np.object_]
    slo_class: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, index: IntArray | BoolArray) -> "Outcomes":
        """The requests at `index` (places or a mask)."""
        columns: dict[str, Any] = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        return Outcomes(**columns)

    @property
    def met(self) -> BoolArray:
        """Which met their targets; rejected, failed and unfinished ones did not."""
        finished = self.status == FINISHED
        first = ttft_met(self.ttft_s, self.ttft_target_s) | np.isposinf(self.ttft_target_s)
        met: BoolArray = finished & first & (np.isnan(self.tpot_s) | (self.tpot_s <= self.tpot_target_s))
        return met

    @property
    def finished_s(self) -> FloatArray:
        """When the service of each ended; where that is not known, when its prefill began, or it arrived."""
        ended: FloatArray = self.prefilled_s + np.nan_to_num(self.tpot_s) * np.maximum(self.output_tokens - 1, 0)
        return ended

    @property
    def prefilled_s(self) -> FloatArray:
        """When each had its first token; where it never had, when its prefill began, or it arrived."""
        ended: FloatArray = self.arrival_s + np.where(np.isnan(self.ttft_s), np.nan_to_num(self.wait_s), self.ttft_s)
        return ended

    def arrivals(self, typical_output_tokens: int) -> Arrivals:
        """What a replay is asked, from second 0 on; nothing in it depends on who decided.

        Args:
            typical_output_tokens: of those whose length is not known.
        """
        start_s = self.arrival_s[0] if len(self) else 0.0
        known = np.where(self.output_tokens > 0, self.output_tokens, typical_output_tokens)
        return Arrivals(self.arrival_s - start_s, self.prompt_tokens, known, self.ttft_target_s, self.tpot_target_s)
