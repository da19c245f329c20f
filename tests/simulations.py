"""Small workloads and fleets for tests that run the simulator; as in `builders`, a prefill takes 1 s a 1,000 tokens."""

from collections.abc import Sequence

import numpy as np
from builders import decode_instance, prefill_instance, step_times

from kairos.adapters.simulator.fleet import DecodeUnit, PrefillUnit, SimulatedFleet
from kairos.adapters.simulator.tables import Workload
from kairos.scheduler_core.config import Handover, KvTransfer
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Control, StepTimes


def workload(
    arrival_s: Sequence[float],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int] | None = None,
    ttft_target_s: Sequence[float] | float = 10.0,
    tpot_target_s: Sequence[float] | float = 0.05,
    tenant: Sequence[str] | None = None,
) -> Workload:
    """Requests 0 to n - 1, arrivals ascending; one output token each unless told otherwise."""
    n = len(arrival_s)
    return Workload(
        trace="made-up",
        request_id=range(n),
        arrival_s=np.array(arrival_s, dtype=np.float64),
        prompt_tokens=np.array(prompt_tokens, dtype=np.int64),
        output_tokens=np.array([1] * n if output_tokens is None else output_tokens, dtype=np.int64),
        ttft_target_s=np.broadcast_to(np.array(ttft_target_s, dtype=np.float64), n),
        tpot_target_s=np.broadcast_to(np.array(tpot_target_s, dtype=np.float64), n),
        slo_class=["default"] * n,
        tenant=[""] * n if tenant is None else tenant,
        model=[""] * n,
    )


def fleet(
    prefill: int = 1,
    decode: int = 1,
    *,
    times: StepTimes | None = None,
    chunk_tokens: int | None = None,
    max_requests_per_step: int = 1,
    max_batch: int = 64,
    kv_tokens: int = UNLIMITED_TOKENS,
    control: Control = Control.ENGINE,
) -> SimulatedFleet:
    """A fleet of equal instances that hand KV over at once."""
    times = times or step_times()
    return SimulatedFleet(
        [
            PrefillUnit(
                prefill_instance(f"prefill-{n}", times, chunk_tokens, max_requests_per_step, control),
                serves=frozenset({"a-model"}),
                cache_tokens=0,
                kv_held_tokens=UNLIMITED_TOKENS,
            )
            for n in range(prefill)
        ],
        [
            DecodeUnit(
                decode_instance(f"decode-{n}", times, max_batch, kv_tokens, control=control),
                serves=frozenset({"a-model"}),
                swap_out="free",
            )
            for n in range(decode)
        ],
        KvTransfer(),
        Handover(),
    )
