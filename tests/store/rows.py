"""Telemetry made up for tests, as it is sent."""

from typing import Any

from kairos.scheduler_core.telemetry import RequestRow, StepRow


def decode_step(**fields: Any) -> dict[str, Any]:
    """A decode step of 4 requests."""
    step = {"gpu": "H100", "model": "acme/llama-8b", "tp": 2, "engine": "vllm", "run": "r1", "prev_phase": "decode"}
    return step | {"batch_size": 4, "sum_context_tokens": 4000, "latency_ms": 12.5} | fields


def prefill_step(**fields: Any) -> dict[str, Any]:
    """A prefill step of one prompt."""
    step = {"gpu": "H100", "model": "acme/llama-8b", "tp": 2, "engine": "vllm", "run": "r1"}
    return step | {"n_requests": 1, "new_tokens": 512, "cached_tokens": 64, "latency_ms": 30.0} | fields


def request(**fields: Any) -> dict[str, Any]:
    """A request that was predicted well."""
    load = {"prefix_hit_ratio": 0.25, "kv_cache_usage": 0.5, "requests_running": 3, "requests_waiting": 1}
    tokens = {"input_tokens": 480, "output_tokens": 20, "prefill_tokens_in_flight": 512, "decode_tokens_in_flight": 90}
    times = {"ttft_ms": 64.5, "tpot_ms": 11.0, "predicted_ttft_ms": 60.0, "predicted_tpot_ms": 10.0}
    return load | tokens | times | {"request_id": "r-1", "tenant": "acme", "slo_class": "default"} | fields


def step_row(**fields: Any) -> StepRow:
    """A decode step for the store."""
    return StepRow(**decode_step(**fields))


def request_row(**fields: Any) -> RequestRow:
    """A request for the store."""
    return RequestRow(**request(**fields))
