"""What `kairos demo --engine torch` runs in place of emulated GPUs: two small real engines on this machine."""

from typing import TYPE_CHECKING, Any

from kairos.scheduler_core.slo import NO_TARGET_S

if TYPE_CHECKING:
    from kairos.adapters.simulator.tables import Workload

PROFILE = "torch"
MODEL = "small"
CHUNK_TOKENS, SLOTS, SLOT_TOKENS = 512, 16, 4096
TTFT_S, TPOT_S = 4.0, 0.5
_SHORTER = 24
"""Prompts and outputs are so much shorter than the trace's: a CPU computes thousands of tokens a second."""
_MOST_PROMPT, _MOST_OUTPUT = 3_000, 48
PROBE_TOKENS = 1_536


def hardware() -> dict[str, Any]:
    """The fleet: one prefill and one decode worker, a thread each where there is no GPU."""
    import torch

    from kairos.adapters.torch_engine.build import device_name

    torch.set_num_threads(1)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    profile = {"gpu": device, "model": MODEL, "precision": "float32", "engine": "torch"}
    return {
        "profiles": {PROFILE: profile},
        "fleet": {
            "prefill": [{"count": 1, "profile": PROFILE, "chunk_tokens": CHUNK_TOKENS}],
            "decode": [{"count": 1, "profile": PROFILE, "max_batch": SLOTS, "kv_tokens": SLOTS * SLOT_TOKENS}],
        },
        "slo": {"classes": {"default": {"ttft_s": TTFT_S, "tpot_s": TPOT_S}}},
    }


def shortened(sent: "Workload") -> "Workload":
    """A workload as long prompts and short ones as before, for a small engine."""
    from dataclasses import replace

    import numpy as np

    return replace(
        sent,
        prompt_tokens=np.clip(sent.prompt_tokens // _SHORTER, 16, _MOST_PROMPT),
        output_tokens=np.clip(sent.output_tokens // _SHORTER, 1, _MOST_OUTPUT),
        ttft_target_s=np.full(len(sent), TTFT_S),
        tpot_target_s=np.full(len(sent), TPOT_S),
        block_ids=None,
        block_tokens=0,
    )


def probe() -> "Workload":
    """One prompt, whose time says how much the engine can take."""
    import numpy as np

    from kairos.adapters.simulator.tables import Workload

    return Workload(
        trace="probe",
        request_id=["probe"],
        arrival_s=np.zeros(1),
        prompt_tokens=np.full(1, PROBE_TOKENS),
        output_tokens=np.ones(1, np.int64),
        ttft_target_s=np.full(1, NO_TARGET_S),
        tpot_target_s=np.full(1, NO_TARGET_S),
        slo_class=["default"],
        tenant=[""],
        model=[""],
    )


def at_load(sent: "Workload", load: float, probe_s: float, seconds: float) -> "Workload":
    """The first so many seconds of a workload whose arrivals come at `load` times what the probe says is possible."""
    from kairos.adapters.simulator.workload import first_requests, scale_time

    work_s = float(sent.prompt_tokens.sum()) * probe_s / PROBE_TOKENS
    scaled = scale_time(sent, work_s / (load * float(sent.arrival_s[-1] - sent.arrival_s[0])))
    return first_requests(scaled, int((scaled.arrival_s - scaled.arrival_s[0] <= seconds).sum()))
