"""From what became of each request to the figures of summary.json and results.json, with intervals and a verdict.

Definitions, by the instants they are made of, are in docs/evidence.md; the intervals' method is in `intervals`.
Figures that do not exist (a TPOT where no decode ran, an interval of too short a trace) are None, null in JSON.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec
import numpy as np

from kairos.adapters.simulator.intervals import (
    BlockSampling,
    Interval,
    TimeBlocks,
    blocks_of,
    drains_s,
    quantile_interval,
)
from kairos.adapters.simulator.tables import STATUSES, IntArray, RequestTable, Status
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.slo import BoolArray, FloatArray

N = TypeVar("N")

Metric = Literal["ttft_attainment", "tpot_attainment", "slo_attainment"]
Verdict = Literal["better", "worse", "no-difference", "undecided", "too short for an interval"]

MARGIN_PP = 1.0
"""Differences within so many points count as none."""
CHANCE_OF_FALSE = 0.05
"""How often a pair without a difference is called better or worse."""
TENANTS_NAMED = 50
REST = "other"
DRAIN_QUANTILE = 0.9

_WORDS: dict[Metric, str] = {
    "ttft_attainment": "TTFT",
    "tpot_attainment": "TPOT",
    "slo_attainment": "TTFT and TPOT",
}


class Estimate(msgspec.Struct, frozen=True):
    """A figure over all seeds of a cell, its 95 % interval and the number of time blocks behind it."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Quantiles(msgspec.Struct, Generic[N], frozen=True):
    """How something is spread over requests or gaps."""

    p50: N | None
    p95: N | None
    p99: N | None
    max: N | None


class DecisionTime(msgspec.Struct, Generic[N], frozen=True):
    """Microseconds a policy's decision took."""

    p50: N | None
    p99: N | None


class PredictorError(msgspec.Struct, Generic[N], frozen=True):
    """|predicted / actual - 1| of isolated prefill times."""

    median_ape: N | None
    p95_ape: N | None


class Attainments(msgspec.Struct, Generic[N], frozen=True):
    """Shares, 0 to 1, of all submitted requests that met a target."""

    ttft_attainment: N | None
    tpot_attainment: N | None
    slo_attainment: N | None


class Metrics(Attainments[N], Generic[N], frozen=True):
    """`metrics` of summary.json (`Metrics[float]`) and of a cell of results.json (`Metrics[Estimate]`)."""

    goodput_per_s: N | None
    output_tokens_per_s: N | None
    ttft_s: Quantiles[N]
    tpot_s: Quantiles[N]
    itl_s: Quantiles[N]
    worst_wait_s: N | None
    fluidity: N | None
    rejected: N | None
    unfinished: N | None
    by_prompt_quartile: dict[str, Attainments[N]]
    """q1 (shortest prompts) to q4."""
    by_class: dict[str, Attainments[N]]
    by_tenant: dict[str, Attainments[N]]
    """The 50 tenants with most requests, and "other"; empty when nobody has a tenant."""
    decision_us: DecisionTime[N]
    predictor: PredictorError[N]


class Difference(msgspec.Struct, frozen=True):
    """Percentage points, with both ends of the 95 % interval."""

    mean: float | None
    low: float | None
    high: float | None


class Comparison(msgspec.Struct, frozen=True):
    """One strategy against another on the same arrivals and noise."""

    difference_pp: Difference
    verdict: Verdict


class Meta(msgspec.Struct, frozen=True):
    """What made the figures."""

    version: str
    command: str
    seeds: list[int]
    config: dict[str, object]


class Summary(msgspec.Struct, frozen=True):
    """summary.json."""

    meta: Meta
    metrics: Metrics[float]


class Pair(msgspec.Struct, frozen=True):
    """One of `pairs` of results.json: a minus b in one metric; load None = as recorded."""

    trace: str
    target: str
    load: float | None
    a: str
    b: str
    metric: Metric
    difference_pp: Difference
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Gaps:
    """Every gap between two tokens of a run, in any order; both (g,)."""

    request: IntArray
    """Row of the request in the table."""
    itl_s: FloatArray


def run_metrics(table: RequestTable, decision_us: FloatArray | None = None, gaps: Gaps | None = None) -> Metrics[float]:
    """The figures of one run; without `gaps`, `itl_s` speaks of each request's longest gap."""
    figures = _Figures([table], blocks_of(table.workload.arrival_s, math.inf), lambda estimate: estimate.mean)
    return _metrics(figures, None if decision_us is None else [decision_us], None if gaps is None else [gaps])


def cell_metrics(
    tables: Sequence[RequestTable],
    blocks: TimeBlocks,
    decision_us: Sequence[FloatArray] | None = None,
    gaps: Sequence[Gaps] | None = None,
) -> Metrics[Estimate]:
    """The figures of one strategy over its seeds, each with an interval over `blocks`.

    Shares, rates and quantiles are of all seeds' requests together; counts are per run; `max` and `worst_wait_s` are
    means of the runs' and have no interval, nor has `decision_us`, which belongs to the machine.

    Args:
        tables: One run a seed.
        blocks: From `time_blocks`, the same for all strategies of a cell.
        decision_us: (d,) a run.
        gaps: One a run; without it `itl_s` speaks of each request's longest gap.
    """
    return _metrics(_Figures(tables, blocks, lambda estimate: estimate), decision_us, gaps)


def time_blocks(baseline: Sequence[RequestTable]) -> TimeBlocks:
    """The blocks of a cell: at least a minute and three times what the baseline's queue takes to drain.

    Drain is asked at the arrivals of requests that missed a target, p90: at arrivals, not over the clock, since bursts
    are what must fit. A request waits until its first token, and then as long again as its longest gap (which holds
    transfer, admission to decode and swap-outs); one that never gets a token waits until the run ends. A lost request
    that lets later ones pass is nobody's queue. Under arrival order in overload the queue never drains and there is no
    interval: take a baseline that puts lost requests last.
    """
    late_drains = np.concatenate([_late_drains_s(table) for table in baseline])
    drain_s = float(np.quantile(late_drains, DRAIN_QUANTILE)) if late_drains.size else 0.0
    return blocks_of(baseline[0].workload.arrival_s, drain_s)


def pair_verdict(
    tables_a: Sequence[RequestTable],
    tables_b: Sequence[RequestTable],
    blocks: TimeBlocks,
    metric: Metric = "slo_attainment",
) -> Comparison:
    """How much more often a met its targets than b did, and what may be said about it.

    Raises:
        InputError: The runs do not pair: other seeds or other arrivals.
    """
    paired = len(tables_a) == len(tables_b) and all(
        np.array_equal(a.workload.arrival_s, b.workload.arrival_s) for a, b in zip(tables_a, tables_b, strict=True)
    )
    if not paired:
        raise InputError(
            f"{len(tables_a)} runs of one strategy and {len(tables_b)} of the other do not pair; "
            "compare runs of the same seeds on the same arrivals"
        )
    figures = _Figures(tables_a, blocks, lambda estimate: estimate)
    gains = [
        (_met(a, metric).astype(np.float64) - _met(b, metric)) * 100.0 for a, b in zip(tables_a, tables_b, strict=True)
    ]
    estimate = figures.share(gains, figures.everyone, limits=(-100.0, 100.0))
    if estimate is None:
        return Comparison(Difference(None, None, None), "too short for an interval")
    return Comparison(Difference(estimate.mean, estimate.low, estimate.high), _verdict(estimate.low, estimate.high))


def expected_false(pairs: Sequence[Comparison | Pair]) -> float:
    """How many of these would be called better or worse by chance if no strategy differed from another."""
    return CHANCE_OF_FALSE * sum(pair.verdict != "too short for an interval" for pair in pairs)


def sentence(pair: Pair) -> str:
    """A pair in plain words.

    >>> sentence(Pair("t", "fixed:2", 1.0, "kairos", "tuned", "slo_attainment", Difference(4.9, 2.1, 7.7), "better"))
    'kairos met TTFT and TPOT more often than tuned: +4.9 points (+2.1 to +7.7) at load 1.0 of t, fixed:2'
    """
    targets = _WORDS[pair.metric]
    load = "as recorded" if pair.load is None else f"at load {pair.load}"
    load += f" of {pair.trace}, {pair.target}"
    mean, low, high = pair.difference_pp.mean, pair.difference_pp.low, pair.difference_pp.high
    if mean is None:
        return f"{pair.a} against {pair.b}: nothing was submitted {load}"
    if low is None or high is None:
        return f"{pair.a} against {pair.b} in meeting {targets}: {mean:+.1f} points {load}, too short for an interval"
    finding = {
        "better": f"{pair.a} met {targets} more often than {pair.b}",
        "worse": f"{pair.a} met {targets} less often than {pair.b}",
        "no-difference": f"{pair.a} and {pair.b} met {targets} equally often, within {MARGIN_PP:.0f} point",
    }.get(pair.verdict, f"no difference shown between {pair.a} and {pair.b} in meeting {targets}")
    return f"{finding}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}) {load}"


def _verdict(low: float | None, high: float | None) -> Verdict:
    if low is None or high is None:
        return "too short for an interval"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "no-difference" if low >= -MARGIN_PP and high <= MARGIN_PP else "undecided"


class _Figures(Generic[N]):
    """Shares, rates and quantiles of one cell's runs. A column is a list with one (n,) array a run."""

    def __init__(self, tables: Sequence[RequestTable], blocks: TimeBlocks, wrap: Callable[[Estimate], N]) -> None:
        self.tables = tables
        self.blocks = blocks
        self._wrap = wrap
        self._sampling = BlockSampling(len(tables), blocks.count)
        self._index = [blocks.index(table.workload.arrival_s) for table in tables]
        self.everyone = [np.ones(len(table.workload)) for table in tables]

    def share(
        self, amount: Sequence[FloatArray], counted: Sequence[FloatArray], limits: tuple[float, float] = (0.0, 1.0)
    ) -> N | None:
        """Summed amount / summed counted; the interval stays within what is possible."""
        return self._ratio(self._sums(amount), self._sums(counted), limits)

    def rate(self, amount: Sequence[FloatArray], per: Sequence[float]) -> N | None:
        """The mean over the runs of a run's summed amount / per."""
        even = np.repeat(np.asarray(per)[:, None] / self.blocks.count, self.blocks.count, axis=1)
        return self._ratio(self._sums(amount), even, (0.0, math.inf))

    def quantile(self, values: Sequence[FloatArray], q: float, rows: Sequence[IntArray] | None = None) -> N | None:
        """The q-quantile of what is not NaN; `rows` says whose each value is, by default request i has the i-th."""
        pooled = np.concatenate(values)
        pooled = pooled[~np.isnan(pooled)]
        if pooled.size == 0:
            return None
        point = float(np.quantile(pooled, q))
        below = self._sums([(column <= point).astype(np.float64) for column in values], rows)
        there = self._sums([(~np.isnan(column)).astype(np.float64) for column in values], rows)
        shares = self._sampling.ratio_interval(below, there)
        interval = None if shares is None else quantile_interval(shares, pooled)
        return self._estimate(point, interval, there)

    def mean(self, per_run: Sequence[float]) -> N | None:
        """The mean of one number a run, NaN left out; no interval."""
        known = [number for number in per_run if not math.isnan(number)]
        if not known:
            return None
        return self._estimate(float(np.mean(known)), None, self._sums(self.everyone))

    def quantiles(self, values: Sequence[FloatArray], rows: Sequence[IntArray] | None = None) -> Quantiles[N]:
        """p50, p95 and p99, and the mean over the runs of the largest."""
        p50, p95, p99 = (self.quantile(values, q, rows) for q in (0.5, 0.95, 0.99))
        return Quantiles(p50, p95, p99, self.mean([_largest(column) for column in values]))

    def _ratio(self, numerator: FloatArray, denominator: FloatArray, limits: tuple[float, float]) -> N | None:
        if not denominator.sum() > 0:
            return None
        interval = self._sampling.ratio_interval(numerator, denominator)
        if interval is not None:
            interval = Interval(*(float(end) for end in np.clip(interval, *limits)))
        return self._estimate(float(numerator.sum() / denominator.sum()), interval, denominator)

    def _estimate(self, mean: float, interval: Interval | None, counted: FloatArray) -> N:
        low, high = (None, None) if interval is None else interval
        return self._wrap(Estimate(mean, low, high, n=int(np.count_nonzero(counted.sum(axis=0)))))

    def _sums(self, amount: Sequence[FloatArray], rows: Sequence[IntArray] | None = None) -> FloatArray:
        """(runs, blocks)."""
        index = self._index if rows is None else [of[row] for of, row in zip(self._index, rows, strict=True)]
        return np.stack([self.blocks.sums(at, column) for at, column in zip(index, amount, strict=True)])


def _metrics(figures: _Figures[N], decision_us: Sequence[FloatArray] | None, gaps: Sequence[Gaps] | None) -> Metrics[N]:
    """Each figure of docs/files.md, defined once for a run and for a cell."""
    tables = figures.tables
    decoded = any(_decode_ran(table) for table in tables)
    overall = _attainments(figures, figures.everyone)
    if gaps is None:
        itl_s = figures.quantiles([table.max_itl_s for table in tables])
    else:
        itl_s = figures.quantiles([gap.itl_s for gap in gaps], [gap.request for gap in gaps])
    later_tokens = [np.maximum(table.workload.output_tokens - 1.0, 0.0) for table in tables]
    error = [np.abs(table.predicted_prefill_s / table.actual_prefill_s - 1.0) for table in tables]
    decisions = decision_us or []
    return Metrics(
        ttft_attainment=overall.ttft_attainment,
        tpot_attainment=overall.tpot_attainment,
        slo_attainment=overall.slo_attainment,
        goodput_per_s=figures.rate(
            [_met(table, "slo_attainment" if decoded else "ttft_attainment").astype(np.float64) for table in tables],
            [float(np.ptp(table.workload.arrival_s)) if len(table.workload) else 0.0 for table in tables],
        ),
        output_tokens_per_s=figures.rate(
            [_tokens(table) for table in tables], [_run_end_s(table) - _run_start_s(table) for table in tables]
        ),
        ttft_s=figures.quantiles([table.ttft_s for table in tables]),
        tpot_s=figures.quantiles([table.tpot_s for table in tables]),
        itl_s=itl_s,
        worst_wait_s=figures.mean([_largest(_wait_s(table)) for table in tables]),
        fluidity=figures.share([table.tokens_in_time.astype(np.float64) for table in tables], later_tokens)
        if decoded
        else None,
        rejected=figures.rate([_with_status(table, "rejected") for table in tables], [1.0] * len(tables)),
        unfinished=figures.rate(
            [_with_status(table, "unfinished") + _with_status(table, "failed") for table in tables],
            [1.0] * len(tables),
        ),
        by_prompt_quartile=_by_group(figures, [_prompt_quartile(table) for table in tables]),
        by_class=_by_group(figures, [list(table.workload.slo_class) for table in tables]),
        by_tenant=_by_group(figures, _tenants(tables)),
        decision_us=DecisionTime(
            *(figures.mean([float(np.quantile(us, q)) for us in decisions if us.size]) for q in (0.5, 0.99))
        ),
        predictor=PredictorError(*(figures.quantile(error, q) for q in (0.5, 0.95))),
    )


def _attainments(figures: _Figures[N], counted: Sequence[FloatArray]) -> Attainments[N]:
    """Over the requests where `counted` is 1; TPOT and both together only where decode was part of the run."""
    decoded = any(_decode_ran(table) for table in figures.tables)

    def share(metric: Metric) -> N | None:
        met = [_met(table, metric) * of for table, of in zip(figures.tables, counted, strict=True)]
        return figures.share(met, counted)

    return Attainments(
        share("ttft_attainment"),
        share("tpot_attainment") if decoded else None,
        share("slo_attainment") if decoded else None,
    )


def _by_group(figures: _Figures[N], labels: Sequence[Sequence[str]]) -> dict[str, Attainments[N]]:
    columns = [np.asarray(of_run, dtype=object) for of_run in labels]
    names = sorted({name for of_run in labels for name in of_run})
    return {name: _attainments(figures, [(column == name).astype(np.float64) for column in columns]) for name in names}


def _prompt_quartile(table: RequestTable) -> list[str]:
    prompt_tokens = table.workload.prompt_tokens
    if not prompt_tokens.size:
        return []
    cuts = np.quantile(prompt_tokens, [0.25, 0.5, 0.75])
    return [f"q{quarter + 1}" for quarter in np.searchsorted(cuts, prompt_tokens, side="left")]


def _tenants(tables: Sequence[RequestTable]) -> list[list[str]]:
    """Each request's tenant, beyond the largest 50 "other"; nothing when nobody names one."""
    requests = Counter(tenant for table in tables for tenant in table.workload.tenant)
    if not any(requests):
        return [[] for _ in tables]
    named = set(sorted(requests, key=lambda tenant: (-requests[tenant], tenant))[:TENANTS_NAMED])
    return [[tenant if tenant in named else REST for tenant in table.workload.tenant] for table in tables]


def _met(table: RequestTable, metric: Metric) -> BoolArray:
    return {
        "ttft_attainment": table.ttft_met,
        "tpot_attainment": table.tpot_met,
        "slo_attainment": table.slo_met,
    }[metric]


def _decode_ran(table: RequestTable) -> bool:
    """Whether the run went past first tokens; a run without any token may have."""
    return bool(np.isfinite(table.last_token_s).any() or not np.isfinite(table.first_token_s).any())


def _with_status(table: RequestTable, status: Status) -> FloatArray:
    return np.asarray(table.status == STATUSES.index(status), dtype=np.float64)


def _tokens(table: RequestTable) -> FloatArray:
    """Output tokens known to have come: all of a request with a last token, one of a request with a first."""
    some = np.isfinite(table.first_token_s).astype(np.float64)
    return np.where(np.isfinite(table.last_token_s), table.workload.output_tokens, some)


def _wait_s(table: RequestTable) -> FloatArray:
    """From arrival to the first prefill step; NaN if it was refused.

    To the first token where nobody told when prefill began, to the run's end where there is none.
    """
    until_s = np.where(np.isnan(table.prefill_start_s), table.first_token_s, table.prefill_start_s)
    until_s = np.where(np.isnan(until_s), _run_end_s(table), until_s)
    return np.where(_with_status(table, "rejected") == 1.0, np.nan, until_s - table.workload.arrival_s)


def _late_drains_s(table: RequestTable) -> FloatArray:
    first_token_s = np.where(np.isnan(table.first_token_s), _run_end_s(table), table.first_token_s)
    waits_until_s = first_token_s + np.nan_to_num(table.max_itl_s, nan=0.0)
    aside, since_s = _put_aside(table, first_token_s)
    waits_until_s = np.where(aside, np.minimum(waits_until_s, since_s), waits_until_s)
    late = ~(table.slo_met if _decode_ran(table) else table.ttft_met)
    return drains_s(table.workload.arrival_s, waits_until_s)[late]


def _put_aside(table: RequestTable, first_token_s: FloatArray) -> tuple[BoolArray, FloatArray]:
    """Which requests stopped standing in anybody's way, and when: (n,) each.

    A refused one did on arrival. A lost one did at its deadline if its instance served someone who came after that
    first; under arrival order nobody overtakes, and lost requests stand in the way until they are served.
    """
    arrival_s = table.workload.arrival_s
    deadline_s = arrival_s + table.workload.ttft_target_s
    refused = _with_status(table, "rejected") == 1.0
    aside = refused.copy()
    for instance in np.unique(table.prefill_instance):
        here = np.flatnonzero(table.prefill_instance == instance)
        soonest_s = np.append(np.minimum.accumulate(first_token_s[here][::-1])[::-1], math.inf)  # of those from i on
        came_after = np.searchsorted(arrival_s[here], deadline_s[here], side="right")
        aside[here] |= soonest_s[came_after] < first_token_s[here]
    return aside, np.where(refused, arrival_s, deadline_s)


def _run_start_s(table: RequestTable) -> float:
    return float(np.min(table.workload.arrival_s, initial=math.inf))


def _run_end_s(table: RequestTable) -> float:
    """The last arrival, first token or last token."""
    instants = np.concatenate([table.workload.arrival_s, table.first_token_s, table.last_token_s])
    return _largest(instants)


def _largest(values: FloatArray) -> float:
    """NaN when there is none."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else math.nan
