"""Telemetry made up for tests: step times that are known."""

import numpy as np

from kairos.predictors.features import graph_batch
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.telemetry import StepRecord, Steps

PROFILE = Profile("H100-80GB-SXM", "acme/llama-8b", "bf16", 1, 1, "vllm-1")


def decode_s(batch: int, context: int) -> float:
    """5 ms, 20 us a padded request, 30 ns a token of context."""
    return 5e-3 + 2e-5 * float(graph_batch(np.array([batch]))[0]) + 3e-8 * context


def prefill_s(new: int, context: int) -> float:
    """10 ms, 20 us a token, 1 ns a token pair."""
    return 1e-2 + 2e-5 * new + 1e-9 * new * (context + new / 2)


def decode_steps(profile: Profile = PROFILE, noise: float = 0.01, factor: float = 1.0, seed: int = 0) -> Steps:
    """800 steps at batches 1 to 32 and contexts up to 4,000 a request."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(800):
        batch = int(rng.integers(1, 33))
        context = batch * int(rng.integers(100, 4000))
        seconds = factor * decode_s(batch, context) * float(np.exp(noise * rng.normal()))
        records.append(StepRecord("decode", seconds, batch_size=batch, sum_context_tokens=context, prev_phase="decode"))
    return Steps.of(profile, records)


def prefill_steps(profile: Profile = PROFILE, noise: float = 0.01, factor: float = 1.0, seed: int = 0) -> Steps:
    """200 steps of single prompts of 100 to 8,000 new tokens over up to 4,000 cached ones."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(200):
        new, cached = int(2 ** rng.uniform(6.6, 13)), int(rng.integers(0, 2)) * int(rng.integers(0, 4000))
        seconds = factor * prefill_s(new, cached) * float(np.exp(noise * rng.normal()))
        records.append(StepRecord("prefill", seconds, n_requests=1, new_tokens=new, cached_tokens=cached))
    return Steps.of(profile, records)
