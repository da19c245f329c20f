"""What a trace is like: rate, burstiness, lengths and shareable prefixes, as in the data pack's table."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kairos.adapters.traces.trace import IntArray, Trace
from kairos.scheduler_core.slo import FloatArray


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of token lengths."""

    p50: float
    p90: float
    p99: float
    max: float
    mean: float


@dataclass(frozen=True, slots=True)
class Description:
    """The figures of one trace. NaN: not defined for so few requests.

    Counts per second and minute are taken from the first arrival on, the last second or minute being partial.
    """

    name: str
    synthetic: bool
    requests: int
    span_s: float
    """Last minus first arrival."""
    rate_per_s: float
    gap_cv: float
    """Standard deviation over mean of the gaps between arrivals; 1 for Poisson arrivals."""
    idc_1s: float
    """Index of dispersion: variance over mean of the arrivals per second; 1 for Poisson arrivals."""
    idc_60s: float
    peak_per_s: int
    """Arrivals in the busiest second."""
    peak_minute_over_mean: float
    input_tokens: Quantiles
    output_tokens: Quantiles
    block_hit_share: float
    """Share of prefix blocks that an unlimited cache would hold already; NaN without block ids."""
    notes: dict[str, int]


def describe(trace: Trace) -> Description:
    """The figures of a trace."""
    arrival_s = np.sort(trace.arrival_s, kind="stable")
    gaps_s = np.diff(arrival_s)
    span_s = float(arrival_s[-1] - arrival_s[0])
    per_s, per_minute = _Counts.of(arrival_s, 1.0), _Counts.of(arrival_s, 60.0)
    return Description(
        name=trace.name,
        synthetic=trace.synthetic,
        requests=len(trace),
        span_s=span_s,
        rate_per_s=len(trace) / span_s if span_s > 0 else float("nan"),
        gap_cv=float(gaps_s.std() / gaps_s.mean()) if span_s > 0 else float("nan"),
        idc_1s=per_s.dispersion,
        idc_60s=per_minute.dispersion,
        peak_per_s=per_s.peak,
        peak_minute_over_mean=per_minute.peak / per_minute.mean,
        input_tokens=_quantiles(trace.prompt_tokens),
        output_tokens=_quantiles(trace.output_tokens),
        block_hit_share=block_hit_share(trace),
        notes=trace.notes,
    )


def block_hit_share(trace: Trace) -> float:
    """Share of the prefix blocks that earlier requests, in order of arrival, brought into an unlimited cache."""
    if trace.block_ids is None:
        return float("nan")
    seen: set[int] = set()
    hits = blocks = 0
    for row in np.argsort(trace.arrival_s, kind="stable"):
        ids = trace.block_ids[row]
        hits += next((depth for depth, block in enumerate(ids) if block not in seen), len(ids))
        blocks += len(ids)
        seen.update(ids)
    return hits / blocks


class _Counts(NamedTuple):
    """Of the arrivals in each window of one width, from the first arrival on."""

    mean: float
    dispersion: float
    peak: int

    @classmethod
    def of(cls, arrival_s: FloatArray, width_s: float) -> "_Counts":
        windows = np.floor((arrival_s - arrival_s[0]) / width_s)
        occupied = np.unique(windows, return_counts=True)[1]  # a trace of days has many empty seconds: not listed
        mean = len(arrival_s) / (windows[-1] + 1)
        variance = np.sum(occupied.astype(np.float64) ** 2) / (windows[-1] + 1) - mean**2
        return cls(float(mean), float(variance / mean), int(occupied.max()))


def _quantiles(tokens: IntArray) -> Quantiles:
    p50, p90, p99 = np.quantile(tokens, (0.5, 0.9, 0.99)).tolist()
    return Quantiles(p50, p90, p99, float(tokens.max()), float(tokens.mean()))
