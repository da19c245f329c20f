"""Synthetic traces drawn from the statistics of real ones.

`statistics.json` holds, for each trace of the data pack we imitate, distributions and correlations, no rows of data
(benchmarks/fit_synthetic_traces.py wrote it). Arrivals: the number in each short window follows the recorded
distribution of such counts, and neighbouring windows are correlated through a Gaussian process with a slow and a fast
part. Lengths: the recorded quantiles, input and output with the recorded rank correlation. Prefix blocks: a request
shares the recorded share of its blocks with an earlier one of the recorded age.
"""

import math
from functools import cache
from importlib.resources import files

import msgspec
import numpy as np
from numpy.random import Generator

from kairos.adapters.traces.trace import SYNTHETIC, IntArray, Trace
from kairos.scheduler_core.errors import TraceError, UnknownNameError
from kairos.scheduler_core.slo import FloatArray


class Component(msgspec.Struct, frozen=True):
    """A part of the process behind the counts: its share of the variance, and how long it remembers."""

    share: float
    memory_s: float


class Arrivals(msgspec.Struct, frozen=True):
    """Of the number of arrivals in windows of `window_s`."""

    rate_per_s: float
    window_s: float
    at_ticks: bool
    """Whether all arrivals of a window come at its start, as in traces with coarse clocks."""
    count_shares: list[float]
    """Share of windows with 0, 1, 2, ... arrivals."""
    slow: Component
    fast: Component
    """What the two leave of the variance is drawn anew in every window."""


class Prefixes(msgspec.Struct, frozen=True):
    """Of prompts that share more than the first block, which all share; quantiles at equal steps from 0 to 1."""

    block_tokens: int
    continued_share: float
    """Share of requests that continue an earlier one, chosen so that the share of blocks hit is the recorded one."""
    shared_quantiles: list[float]
    """Of their blocks, the part shared."""
    age_quantiles_s: list[float]
    """How long ago the one they continue arrived."""


class TraceStatistics(msgspec.Struct, frozen=True):
    """What a synthetic trace is drawn from."""

    source: str
    probabilities: list[float]
    input_quantiles: list[float]
    """At `probabilities`, in tokens."""
    output_quantiles: list[float]
    length_correlation: float
    """Rank correlation of input and output length."""
    arrivals: Arrivals
    prefixes: Prefixes | None = None


LOOK_BACK = 500
"""How many requests before the drawn age are looked at for one that is long enough to share."""


@cache
def known_statistics() -> dict[str, TraceStatistics]:
    """The shipped statistics by name."""
    raw = files(__package__).joinpath("statistics.json").read_bytes()
    return msgspec.json.decode(raw, type=dict[str, TraceStatistics])


def generate(like: str, duration_s: float, seed: int, rate_per_s: float | None = None) -> Trace:
    """A synthetic trace; the same arguments give the same trace.

    Args:
        like: a name in `known_statistics`.
        rate_per_s: scales time to this mean rate, so the shape of bursts stays; None: the recorded rate.

    Raises:
        UnknownNameError: nothing is known under `like`.
        TraceError: duration or rate is not a positive number, or nothing arrives in so short a time.
    """
    if like not in known_statistics():
        raise UnknownNameError("trace to imitate", like, known_statistics())
    for name, value in (("duration", duration_s), ("rate", rate_per_s)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TraceError(f"{name} {value:g} is not possible; give a positive number")
    trace = draw(known_statistics()[like], f"{SYNTHETIC}_{like}", duration_s, seed, rate_per_s)
    if not len(trace):
        raise TraceError(f"nothing arrives in {duration_s:g} s of {like} with seed {seed}; generate a longer trace")
    return trace


def draw(
    statistics: TraceStatistics, name: str, duration_s: float, seed: int, rate_per_s: float | None = None
) -> Trace:
    """The same from any statistics; the trace may be empty."""
    rng = np.random.default_rng(seed)
    stretch = 1.0 if rate_per_s is None else statistics.arrivals.rate_per_s / rate_per_s
    recorded_s = draw_arrivals_s(statistics.arrivals, duration_s / stretch, rng)
    prompt_tokens, output_tokens = _draw_lengths(statistics, len(recorded_s), rng)
    prefixes = statistics.prefixes
    return Trace(
        name=name,
        arrival_s=recorded_s * stretch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        block_ids=None if prefixes is None else _draw_blocks(prefixes, recorded_s, prompt_tokens, rng),
        block_tokens=0 if prefixes is None else prefixes.block_tokens,
        type=[SYNTHETIC] * len(recorded_s),
        synthetic=True,
    )


def draw_arrivals_s(arrivals: Arrivals, duration_s: float, rng: Generator) -> FloatArray:
    """Arrivals from 0 to `duration_s`, ascending, (n,)."""
    windows = math.ceil(duration_s / arrivals.window_s)
    rest = max(0.0, 1.0 - arrivals.slow.share - arrivals.fast.share)
    level = math.sqrt(rest) * rng.standard_normal(windows)
    for part in (arrivals.slow, arrivals.fast):
        level += math.sqrt(part.share) * _gauss_markov(windows, arrivals.window_s / part.memory_s, rng)
    counts = np.searchsorted(np.cumsum(arrivals.count_shares)[:-1], _normal_cdf(level), side="right")
    starts_s = np.repeat(np.arange(windows) * arrivals.window_s, counts)
    within_s = 0.0 if arrivals.at_ticks else rng.uniform(0.0, arrivals.window_s, len(starts_s))
    arrival_s: FloatArray = np.sort(starts_s + within_s)
    return arrival_s[arrival_s < duration_s]


def _gauss_markov(count: int, step: float, rng: Generator) -> FloatArray:
    """A stationary Gaussian process, (count,), of variance 1; correlation falls by exp(-step) from value to value."""
    keep = math.exp(-step)
    values = rng.standard_normal(count)
    values[1:] *= math.sqrt(1 - keep * keep)
    for i in range(1, count):
        values[i] += keep * values[i - 1]
    return values


def _normal_cdf(values: FloatArray) -> FloatArray:
    return 0.5 * (1.0 + np.array([math.erf(value) for value in (values / math.sqrt(2)).tolist()]))


def _draw_lengths(statistics: TraceStatistics, count: int, rng: Generator) -> tuple[IntArray, IntArray]:
    correlation = 2 * math.sin(math.pi / 6 * statistics.length_correlation)  # of normals with that rank correlation
    first, second = rng.standard_normal((2, count))
    second = correlation * first + math.sqrt(1 - correlation**2) * second
    prompt, output = (
        np.maximum(np.interp(_normal_cdf(normal), statistics.probabilities, quantiles).astype(np.int64), 1)
        for normal, quantiles in ((first, statistics.input_quantiles), (second, statistics.output_quantiles))
    )
    return prompt, output


def _draw_blocks(
    prefixes: Prefixes, arrival_s: FloatArray, prompt_tokens: IntArray, rng: Generator
) -> list[tuple[int, ...]]:
    """Block ids of each prompt: shared leading ones, then new ones; block 0 begins them all."""
    count = len(arrival_s)
    blocks = -(-prompt_tokens // prefixes.block_tokens)
    continues = rng.uniform(size=count) < prefixes.continued_share
    shared = np.maximum(_from_quantiles(prefixes.shared_quantiles, count, rng) * blocks, 1).astype(np.int64)
    began_s = arrival_s - _from_quantiles(prefixes.age_quantiles_s, count, rng)
    nearest = np.searchsorted(arrival_s, began_s, side="right")
    block_ids: list[tuple[int, ...]] = []
    unused = 1
    for row in range(count):
        prefix: tuple[int, ...] = (0,)
        if continues[row]:
            last = min(int(nearest[row]), row)
            older = range(last - 1, max(-1, last - 1 - LOOK_BACK), -1)
            parent = next((k for k in older if blocks[k] >= shared[row]), None)
            if parent is not None:
                prefix = block_ids[parent][: shared[row]]
        fresh = int(blocks[row]) - len(prefix)
        block_ids.append(prefix + tuple(range(unused, unused + fresh)))
        unused += fresh
    return block_ids


def _from_quantiles(quantiles: list[float], count: int, rng: Generator) -> FloatArray:
    return np.interp(rng.uniform(size=count), np.linspace(0, 1, len(quantiles)), quantiles)
