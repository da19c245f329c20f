"""The columns of a workload and of a run: one row a request, one array a column.

`RequestTable` is requests.csv in memory (docs/files.md): NaN in a float column and -1 in an instance column
mean "not applicable".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.slo import BoolArray, FloatArray

IntArray = NDArray[np.int64]

Status = Literal["finished", "rejected", "failed", "unfinished"]
STATUSES: tuple[Status, ...] = ("finished", "rejected", "failed", "unfinished")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is submitted in a run: n requests in (arrival, file) order, with their targets. Arrays are (n,)."""

    trace: str
    request_id: Sequence[RequestId]
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    ttft_target_s: FloatArray
    tpot_target_s: FloatArray
    """inf where there is none."""
    slo_class: Sequence[str]
    tenant: Sequence[str]
    model: Sequence[str]
    """Empty: any."""
    block_ids: Sequence[tuple[int, ...]] | None = None
    """Prefix block ids of each prompt, of `block_tokens` tokens each."""
    block_tokens: int = 0
    notes: Sequence[str] = ()
    """Counted, named treatments of what the configuration does not know."""

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True)
class RequestTable:
    """What became of each request of a workload: n rows in its order. Arrays are (n,)."""

    workload: Workload
    cached_tokens: IntArray
    prefill_instance: IntArray
    decode_instance: IntArray
    prefill_start_s: FloatArray
    first_token_s: FloatArray
    decode_ready_s: FloatArray
    last_token_s: FloatArray
    max_itl_s: FloatArray
    tokens_in_time: IntArray
    """Of the later tokens, how many met their token deadline (for fluidity)."""
    status: NDArray[np.int8]
    """Index into `STATUSES`."""
    predicted_prefill_s: FloatArray
    """Predicted isolated prefill seconds of the whole prompt when the request arrived."""
    actual_prefill_s: FloatArray
    """The same without predictor error and with the realised noise."""
    ttft_s: FloatArray
    tpot_s: FloatArray
    ttft_met: BoolArray
    tpot_met: BoolArray
    slo_met: BoolArray
