"""Fit the statistics from which `kairos trace generate` draws, on the traces of the data pack.

    KAIROS_DATA=... python benchmarks/fit_synthetic_traces.py

writes adapters/traces/statistics.json and prints recorded against generated figures. The slow and the fast part of the
arrivals are chosen so that long generated series have the recorded autocorrelation of counts and index of dispersion
over a minute; everything else is read off the trace.
"""

import os
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace
from scipy.optimize import differential_evolution
from scipy.signal import lfilter
from scipy.stats import norm, spearmanr

from kairos.adapters.traces import Trace, describe, read_trace
from kairos.adapters.traces.describe import block_hit_share
from kairos.adapters.traces.generate import (
    Arrivals,
    Component,
    Prefixes,
    TraceStatistics,
    draw,
    generate,
    known_statistics,
)

OUT = Path(__file__).parents[1] / "adapters" / "traces" / "statistics.json"
SOURCES = {  # name: file, window of the counts in seconds, whether its clock ticks once a window
    "mooncake_conversation": ("mooncake_conversation", 3.0, True),
    "azure2023_code": ("azure2023_code", 1.0, False),
    "azure2023_conv": ("azure2023_conv", 1.0, False),
    "servegen_r1": ("servegen_r1_resampled", 1.0, False),
}
PROBABILITIES = [0, 0.01, 0.02, 0.05, *np.arange(0.1, 0.91, 0.1).round(2).tolist(), 0.95, 0.98, 0.99, 0.995, 0.999, 1.0]
LAGS_S = (1, 2, 3, 6, 9, 15, 30, 60, 120, 240)
STEPS = 20_000


def main() -> None:
    """Fit all and write the file."""
    folder = Path(os.environ["KAIROS_DATA"]) / "traces"
    traces = {name: read_trace(folder / f"{source[0]}.csv.gz") for name, source in SOURCES.items()}
    fitted = {name: fit(trace, *SOURCES[name][1:]) for name, trace in traces.items()}
    OUT.write_bytes(msgspec.json.format(msgspec.json.encode(fitted), indent=1) + b"\n")
    known_statistics.cache_clear()
    for name, trace in traces.items():
        print(figures(name, trace))
        for seed in range(3):
            print(figures(f"  seed {seed}", generate(name, float(trace.arrival_s.max()), seed)))


def figures(label: str, trace: Trace) -> str:
    """One line of figures."""
    d = describe(trace)
    return (
        f"{label:24} {d.rate_per_s:5.2f}/s cv {d.gap_cv:5.2f} idc {d.idc_1s:5.2f} {d.idc_60s:5.1f} peak {d.peak_per_s}"
        f" in {d.input_tokens.p50:6.0f} {d.input_tokens.p99:6.0f} out {d.output_tokens.p50:5.0f}"
        f" {d.output_tokens.p99:6.0f} hit {d.block_hit_share:.3f}"
    )


def fit(trace: Trace, window_s: float, at_ticks: bool) -> TraceStatistics:
    """The statistics of one trace."""
    correlation = spearmanr(trace.prompt_tokens, trace.output_tokens).statistic
    statistics = TraceStatistics(
        source=f"{trace.name} of the data pack, {len(trace)} requests in {np.ptp(trace.arrival_s):.0f} s",
        probabilities=PROBABILITIES,
        input_quantiles=np.quantile(trace.prompt_tokens, PROBABILITIES).round().tolist(),
        output_quantiles=np.quantile(trace.output_tokens, PROBABILITIES).round().tolist(),
        length_correlation=round(float(correlation), 3),
        arrivals=fit_arrivals(trace, window_s, at_ticks),
        prefixes=fit_prefixes(trace) if trace.block_ids is not None else None,
    )
    for _ in range(5 if statistics.prefixes is not None else 0):
        assert statistics.prefixes is not None
        drawn = [draw(statistics, "calibration", float(np.ptp(trace.arrival_s)), seed) for seed in range(4)]
        excess = block_hit_share(trace) / np.mean([block_hit_share(each) for each in drawn])
        share = round(float(statistics.prefixes.continued_share * excess), 4)
        statistics = replace(statistics, prefixes=replace(statistics.prefixes, continued_share=share))
    return statistics


def fit_arrivals(trace: Trace, window_s: float, at_ticks: bool) -> Arrivals:
    """Counts, and the two memories behind them."""
    # ticks are a few ms off; of free arrivals the last window is not whole
    windows = trace.arrival_s / window_s
    counts = np.bincount(np.rint(windows).astype(int)) if at_ticks else np.bincount(windows.astype(int))[:-1]
    shares = np.bincount(counts) / len(counts)
    minute = int(60 / window_s)
    lags = sorted({max(1, round(lag / window_s)) for lag in LAGS_S})
    recorded = autocorrelation(counts, lags)
    recorded_idc = dispersion(counts, minute)
    noise = np.random.default_rng(0).standard_normal((3, STEPS))

    def simulated(x: np.ndarray) -> np.ndarray:
        slow_share, fast_share = x[0], x[2] * (1 - x[0])
        level = np.sqrt(1 - slow_share - fast_share) * noise[0]
        for share, memory_s, white in ((slow_share, x[1], noise[1]), (fast_share, x[3], noise[2])):
            keep = np.exp(-window_s / memory_s)
            level = level + np.sqrt(share) * lfilter([np.sqrt(1 - keep**2)], [1, -keep], white)
        return np.searchsorted(np.cumsum(shares)[:-1], norm.cdf(level), side="right")

    def loss(x: np.ndarray) -> float:
        drawn = simulated(x)
        apart = np.sum((autocorrelation(drawn, lags) - recorded) ** 2)
        return float(apart + 0.1 * np.log(dispersion(drawn, minute) / recorded_idc) ** 2)

    bounds = [(0, 0.98), (20, 400), (0, 0.98), (0.5, 15)]
    x = differential_evolution(loss, bounds, seed=0, maxiter=60, popsize=10, tol=1e-6).x
    return Arrivals(
        rate_per_s=round(float(counts.mean() / window_s), 4),
        window_s=window_s,
        at_ticks=at_ticks,
        count_shares=shares.round(6).tolist(),
        slow=Component(share=round(float(x[0]), 4), memory_s=round(float(x[1]), 1)),
        fast=Component(share=round(float(x[2] * (1 - x[0])), 4), memory_s=round(float(x[3]), 2)),
    )


def autocorrelation(counts: np.ndarray, lags: list[int]) -> np.ndarray:
    """Of counts, at lags in windows."""
    centred = counts - counts.mean()
    return np.array([np.mean(centred[:-lag] * centred[lag:]) for lag in lags]) / centred.var()


def dispersion(counts: np.ndarray, together: int) -> float:
    """Variance over mean of the sums of `together` neighbouring counts; whole sums only."""
    sums = counts[: len(counts) // together * together].reshape(-1, together).sum(axis=1)
    return float(sums.var() / sums.mean())


def fit_prefixes(trace: Trace) -> Prefixes:
    """How many prompts continue an earlier one, how much of it they share, and how old it is."""
    assert trace.block_ids is not None
    last_seen_s: dict[int, float] = {}
    shared, ages_s = [], []
    for ids, arrival_s in zip(trace.block_ids, trace.arrival_s, strict=True):
        depth = next((depth for depth, block in enumerate(ids) if block not in last_seen_s), len(ids))
        if depth > 1:
            shared.append(depth / len(ids))
            ages_s.append(arrival_s - last_seen_s[ids[depth - 1]])
        last_seen_s |= dict.fromkeys(ids, float(arrival_s))
    steps = np.linspace(0, 1, 21)
    return Prefixes(
        block_tokens=trace.block_tokens,
        continued_share=round(len(shared) / len(trace), 4),
        shared_quantiles=np.quantile(shared, steps).round(4).tolist(),
        age_quantiles_s=np.quantile(ages_s, steps).round(1).tolist(),
    )


if __name__ == "__main__":
    main()
