"""Synthetic step telemetry with the data pack's columns, for machines without the pack.

Step times follow the physics that the predictors' prior knows (a fixed cost, work per token, attention; decode pays for
the CUDA-graph size above its batch) with measurement noise, and stalls that are flagged `outlier`. `source` says
`synthetic` in every row.
"""

import csv
import gzip
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from kairos.scheduler_core.domain import Line, Profile
from kairos.scheduler_core.errors import TelemetryError

PROFILE_COLUMNS = ("source", "run", "gpu", "model", "precision", "tp", "ep", "dp", "engine", "kind", "seq")
PREFILL_COLUMNS = (
    *PROFILE_COLUMNS,
    *("n_requests", "new_tokens", "cached_tokens", "latency_ms", "prev_phase", "queued_requests", "flag"),
)
DECODE_COLUMNS = (
    *PROFILE_COLUMNS,
    *("batch_size", "sum_context_tokens", "mean_context_tokens", "latency_ms"),
    *("prev_phase", "next_phase", "queued_requests", "flag"),
)
GRAPH_SIZES = np.array([1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64])
"""Batch sizes for which engines capture CUDA graphs; a smaller batch is padded."""
NOISE_SIGMA = 0.03
"""Of the logarithm of a step time."""
STALL_SHARE = 0.005
PREFILL_STEPS, DECODE_STEPS = 400, 2_500
"""Rows a profile."""


@dataclass(frozen=True, slots=True)
class SyntheticProfile:
    """A profile and the step times it is drawn from."""

    profile: Profile
    prefill: Line
    decode: Line
    padding_s: float
    """What a decode step pays for each slot of its CUDA graph, used or not."""


PROFILES = (
    SyntheticProfile(
        Profile("B300-SXM6", "Qwen/Qwen3-32B", "bf16", tp=4, engine="vllm-0.20.1"),
        prefill=Line(8.2e-3, 1.48e-5, 3.9e-10),
        decode=Line(5.6e-3, 1.1e-5, 1.0e-8),
        padding_s=2.5e-5,
    ),
    SyntheticProfile(
        Profile("H100-80GB-SXM", "meta-llama/Llama-2-70b", "fp16", tp=8, engine="vllm-2023"),
        prefill=Line(1.9e-2, 6.9e-5, 1.8e-9),
        decode=Line(3.0e-2, 1.0e-4, 2.0e-7),
        padding_s=1.0e-4,
    ),
    SyntheticProfile(
        Profile("H200-SXM", "meta-llama/Llama-3.1-8B-Instruct", "fp8", tp=1, engine="vllm-2025"),
        prefill=Line(1.7e-2, 1.7e-5, 3.4e-10),
        decode=Line(4.0e-3, 4.0e-5, 3.2e-8),
        padding_s=2.0e-5,
    ),
)
"""The first two are those of the fleets b300 and h100."""


def write_telemetry(folder: Path, seed: int) -> list[Path]:
    """Write prefill.csv.gz and decode.csv.gz into a folder, which is made if missing; the same seed, the same bytes.

    Raises:
        TelemetryError: the folder cannot be written.
    """
    rng = np.random.default_rng(seed)
    prefill = [row for profile in PROFILES for row in _prefill_rows(profile, rng)]
    decode = [row for profile in PROFILES for row in _decode_rows(profile, rng)]
    files = {"prefill.csv.gz": (PREFILL_COLUMNS, prefill), "decode.csv.gz": (DECODE_COLUMNS, decode)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (columns, rows) in files.items():
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([columns, *rows])
            (folder / name).write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    except OSError as error:
        raise TelemetryError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from None
    return [folder / name for name in files]


def _prefill_rows(synthetic: SyntheticProfile, rng: Generator) -> Iterable[tuple[object, ...]]:
    a_s, b_s, c_s = synthetic.prefill
    for seq in range(PREFILL_STEPS):
        requests = int(rng.choice([1, 1, 1, 2, 4]))
        new = np.maximum((2 ** rng.uniform(5, 13, requests)).astype(int), 1)
        cached = rng.integers(0, 16_385, requests) * (rng.uniform(size=requests) < 0.4)
        step_s = a_s + float(np.sum(b_s * new + c_s * new * (cached + new / 2)))
        latency_ms, flag = _measured(step_s, rng)
        head = _head(synthetic.profile, "prefill", seq)
        queued = int(rng.poisson(2))
        yield (*head, requests, int(new.sum()), int(cached.sum()), latency_ms, "idle", queued, flag)


def _decode_rows(synthetic: SyntheticProfile, rng: Generator) -> Iterable[tuple[object, ...]]:
    """Live batches: requests come and go, and every step adds a token to each context."""
    a_s, b_s, c_s = synthetic.decode
    contexts: list[int] = []
    target = 1
    for seq in range(DECODE_STEPS):
        if seq % 25 == 0:
            target = round(2 ** rng.uniform(0, 6))
        contexts = [context + 1 for context in contexts[: max(target, 1)]]
        joined = len(contexts) < target
        contexts += [int(2 ** rng.uniform(7, 14)) for _ in range(target - len(contexts))]
        batch, total = len(contexts), sum(contexts)
        graph = int(GRAPH_SIZES[np.searchsorted(GRAPH_SIZES, batch)])
        step_s = a_s + b_s * batch + c_s * total + synthetic.padding_s * graph
        latency_ms, flag = _measured(step_s, rng)
        head = _head(synthetic.profile, "decode", seq)
        phase = "context" if joined else "decode"
        yield (*head, batch, total, round(total / batch, 1), latency_ms, phase, "decode", int(rng.poisson(1)), flag)


def _head(profile: Profile, role: str, seq: int) -> tuple[object, ...]:
    """Every 200 steps count as a run of their own, so that folds by operating point have several."""
    run = f"synthetic_{role}_{seq // 200}"
    data_parallel = 1
    parts = (profile.gpu, profile.model, profile.precision, profile.tp, profile.ep, data_parallel, profile.engine)
    return ("synthetic", run, *parts, "measured_step", seq)


def _measured(step_s: float, rng: Generator) -> tuple[float, str]:
    """A step time with noise, in ms, and its flags; a stall is several times too long."""
    stalled = rng.uniform() < STALL_SHARE
    factor = rng.lognormal(0.0, NOISE_SIGMA) * (rng.uniform(4, 40) if stalled else 1.0)
    return round(step_s * 1000 * factor, 3), "real;outlier" if stalled else "real"
