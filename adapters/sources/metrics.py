"""An engine's Prometheus `/metrics` into a reading, by one table of names an engine.

Source of the names: vLLM 0.33.0, `vllm/v1/metrics/loggers.py`, and the ITL name of releases before 0.20; SGLang 0.5.23,
`sglang/srt/metrics/collector.py` (docs/telemetry.md says what each becomes).
"""

import math
from dataclasses import dataclass, field

from kairos.adapters.sources.readings import Reading
from kairos.scheduler_core.errors import TelemetryError


@dataclass(frozen=True, slots=True)
class Names:
    """By field of `SampleRow` the series that say it; of several, the first that is there."""

    gauges: dict[str, tuple[str, ...]]
    """Summed over ranks."""
    shares: dict[str, tuple[str, ...]]
    """From 0 to 1; the mean over ranks."""
    counters: dict[str, tuple[str, ...]]
    seconds: dict[str, tuple[str, ...]]
    """Histograms in seconds, for fields in milliseconds."""
    ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Two counters."""


VLLM = Names(
    gauges={
        "requests_running": ("vllm:num_requests_running",),
        "requests_waiting": ("vllm:num_requests_waiting",),
    },
    shares={"kv_cache_usage": ("vllm:kv_cache_usage_perc",)},
    counters={
        "finished_requests": ("vllm:request_success_total",),
        "prompt_tokens": ("vllm:prompt_tokens_total",),
        "output_tokens": ("vllm:generation_tokens_total",),
        "preemptions": ("vllm:num_preemptions_total",),
        "kv_expired": ("vllm:nixl_num_kv_expired_reqs_total", "vllm:mooncake_num_kv_expired_reqs_total"),
        "failed_transfers": ("vllm:nixl_num_failed_transfers_total", "vllm:mooncake_num_failed_transfers_total"),
    },
    seconds={
        "ttft_ms": ("vllm:time_to_first_token_seconds",),
        "itl_ms": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "e2e_ms": ("vllm:e2e_request_latency_seconds",),
    },
    ratios={"prefix_hit_ratio": ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")},
)

SGLANG = Names(
    gauges={
        "requests_running": ("sglang:num_running_reqs",),
        "requests_waiting": ("sglang:num_queue_reqs",),
    },
    shares={"kv_cache_usage": ("sglang:token_usage",)},
    counters={
        "finished_requests": ("sglang:num_requests_total",),
        "prompt_tokens": ("sglang:prompt_tokens_total",),
        "output_tokens": ("sglang:generation_tokens_total",),
        "failed_transfers": ("sglang:num_transfer_failed_reqs_total",),
    },
    seconds={
        "ttft_ms": ("sglang:time_to_first_token_seconds",),
        "itl_ms": ("sglang:inter_token_latency_seconds",),
        "e2e_ms": ("sglang:e2e_request_latency_seconds",),
    },
    ratios={"prefix_hit_ratio": ("sglang:cached_tokens_total", "sglang:prompt_tokens_total")},
)


def reading_of_metrics(names: Names, body: bytes) -> Reading:
    """What its `/metrics` says; series that are not there are left out.

    Raises:
        TelemetryError: it is no Prometheus text, or of another engine.
    """
    series = _series(body.decode("utf-8", "replace"))

    def found(alternatives: tuple[str, ...]) -> list[float] | None:
        return next((series[name] for name in alternatives if name in series), None)

    now = {name: sum(values) for name, of in names.gauges.items() if (values := found(of)) is not None}
    now |= {name: sum(values) / len(values) for name, of in names.shares.items() if (values := found(of)) is not None}
    totals = {name: sum(values) for name, of in names.counters.items() if (values := found(of)) is not None}
    means: dict[str, tuple[float, float]] = {}
    for name, of in names.seconds.items():
        sums, counts = (found(tuple(f"{base}_{part}" for base in of)) for part in ("sum", "count"))
        if sums is not None and counts is not None:
            means[name] = sum(sums) * 1e3, sum(counts)
    for name, (part, whole) in names.ratios.items():
        if part in series and whole in series:
            means[name] = sum(series[part]), sum(series[whole])
    reading = Reading(now, totals, means)
    if not reading:
        raise TelemetryError("its metrics have no series of this engine")
    return reading


def _series(text: str) -> dict[str, list[float]]:
    """The finite values of each series by name, one for each set of labels."""
    from prometheus_client.parser import text_string_to_metric_families

    series: dict[str, list[float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if math.isfinite(sample.value) and not sample.name.endswith("_bucket"):
                    series.setdefault(sample.name, []).append(sample.value)
    except ValueError as error:
        raise TelemetryError(f"its metrics are no Prometheus text: {' '.join(str(error).split())[:200]}") from None
    return series
