"""The figures of a run and of a cell: hand-worked, bounded, and the same whichever way one looks."""

import math
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kairos.adapters.simulator.evidence import (
    Comparison,
    Difference,
    Gaps,
    Metric,
    Metrics,
    Pair,
    Verdict,
    cell_metrics,
    expected_false,
    pair_verdict,
    run_metrics,
    sentence,
    time_blocks,
)
from kairos.adapters.simulator.intervals import TimeBlocks, blocks_of
from kairos.adapters.simulator.tables import STATUSES, IntArray, RequestTable, Workload
from kairos.scheduler_core import slo
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.slo import FloatArray

NAN = math.nan


def table(
    arrival_s: FloatArray,
    ttft_s: FloatArray,
    tpot_s: FloatArray | None = None,
    *,
    output_tokens: int = 11,
    ttft_target_s: float = 2.0,
    tpot_target_s: float = 0.05,
    prompt_tokens: IntArray | None = None,
    tenant: list[str] | None = None,
    slo_class: list[str] | None = None,
) -> RequestTable:
    """A run in which requests waited nine tenths of their TTFT; NaN in `ttft_s` is a refusal."""
    n = len(arrival_s)
    prompt = np.full(n, 100) if prompt_tokens is None else prompt_tokens
    tpot = np.full(n, 0.04) if tpot_s is None else tpot_s
    finished = ~np.isnan(ttft_s)
    outputs = np.full(n, output_tokens)
    targets = np.full(n, ttft_target_s), np.full(n, tpot_target_s)
    in_time = slo.ttft_met(ttft_s, targets[0]), slo.tpot_met(tpot, targets[1], outputs.astype(float), finished)
    no_instance = np.full(n, -1)
    return RequestTable(
        workload=Workload(
            trace="made-up",
            request_id=range(n),
            arrival_s=arrival_s,
            prompt_tokens=prompt,
            output_tokens=outputs,
            ttft_target_s=targets[0],
            tpot_target_s=targets[1],
            slo_class=slo_class or ["default"] * n,
            tenant=tenant or [""] * n,
            model=[""] * n,
        ),
        cached_tokens=np.zeros(n, dtype=np.int64),
        prefill_instance=no_instance,
        decode_instance=no_instance,
        prefill_start_s=arrival_s + 0.9 * ttft_s,
        first_token_s=arrival_s + ttft_s,
        decode_ready_s=arrival_s + ttft_s,
        last_token_s=arrival_s + ttft_s + tpot * (outputs - 1),
        max_itl_s=np.where(finished, 2 * tpot, NAN),
        tokens_in_time=np.where(in_time[1], outputs - 1, 0),
        status=np.where(finished, STATUSES.index("finished"), STATUSES.index("rejected")).astype(np.int8),
        predicted_prefill_s=np.full(n, 1.1),
        actual_prefill_s=np.full(n, 1.0),
        ttft_s=ttft_s,
        tpot_s=np.where(finished, tpot, NAN),
        ttft_met=in_time[0],
        tpot_met=in_time[1],
        slo_met=in_time[0] & in_time[1],
    )


def bursty(seed: int, ttft_factor: float = 1.0, n: int = 3000, span_s: float = 3000.0) -> RequestTable:
    """TTFT swings with a slow wave of load; seeds share the wave and the arrivals and draw their own noise."""
    arrival_s = np.sort(np.random.default_rng(7).uniform(0.0, span_s, n))
    noise = np.random.default_rng([8, seed]).lognormal(0.0, 0.5, n)
    return table(arrival_s, ttft_factor * noise * (1.2 + np.sin(arrival_s / 150.0)))


#                           q1             q2    q3    q4
FOUR = table(np.array([0.0, 10.0, 20.0, 40.0]), np.array([1.0, 2.0, 3.0, NAN]), np.array([0.04, 0.06, 0.04, 0.04]))


def test_a_run_of_four_requests_gives_the_figures_worked_out_by_hand() -> None:
    metrics = run_metrics(FOUR, decision_us=np.array([1.0, 3.0]))

    assert (metrics.ttft_attainment, metrics.tpot_attainment, metrics.slo_attainment) == (0.5, 0.5, 0.25)
    assert metrics.goodput_per_s == pytest.approx(1 / 40.0)  # one kept both, arrivals span 40 s
    assert metrics.output_tokens_per_s == pytest.approx(33 / 40.0)  # the last thing to happen is the arrival at 40
    assert (metrics.ttft_s.p50, metrics.ttft_s.max) == (2.0, 3.0)
    assert metrics.itl_s.max == pytest.approx(0.12)
    assert metrics.worst_wait_s == pytest.approx(2.7)
    assert metrics.fluidity == pytest.approx(20 / 40)
    assert (metrics.rejected, metrics.unfinished) == (1, 0)
    assert (metrics.decision_us.p50, metrics.decision_us.p99) == pytest.approx((2.0, 2.98))
    assert metrics.predictor.median_ape == pytest.approx(0.1)


def test_an_unfinished_request_is_missed_and_its_wait_lasts_to_the_end_of_the_run() -> None:
    stuck = replace(FOUR, status=np.array([0, 0, 0, STATUSES.index("unfinished")], dtype=np.int8))
    stuck = replace(stuck, workload=replace(stuck.workload, arrival_s=np.array([0.0, 10.0, 20.0, 20.5])))

    metrics = run_metrics(stuck)

    assert (metrics.rejected, metrics.unfinished, metrics.slo_attainment) == (0, 1, 0.25)
    assert metrics.worst_wait_s == pytest.approx(20.0 + 3.0 + 0.4 - 20.5)  # request 2 ends the run


def test_quartiles_classes_and_tenants_partition_the_requests() -> None:
    n = 400
    rng = np.random.default_rng(1)
    run = table(
        np.arange(float(n)),
        rng.uniform(0.0, 4.0, n),
        prompt_tokens=rng.permutation(n) + 1,
        tenant=[f"t{i % 70}" for i in range(n)],
        slo_class=["chat" if i % 3 else "batch" for i in range(n)],
    )

    metrics = run_metrics(run)

    assert list(metrics.by_prompt_quartile) == ["q1", "q2", "q3", "q4"]
    quartiles = [group.slo_attainment or 0.0 for group in metrics.by_prompt_quartile.values()]
    assert np.mean(quartiles) == pytest.approx(metrics.slo_attainment)
    assert set(metrics.by_class) == {"chat", "batch"}
    assert len(metrics.by_tenant) == 51
    assert metrics.by_tenant["other"].slo_attainment == pytest.approx(
        np.mean([run.slo_met[i] for i in range(n) if f"t{i % 70}" not in metrics.by_tenant])
    )


def test_what_does_not_exist_is_null_and_never_nan() -> None:
    prefill_only = replace(
        FOUR, last_token_s=np.full(4, NAN), tpot_s=np.full(4, NAN), max_itl_s=np.full(4, NAN), slo_met=FOUR.ttft_met
    )
    empty = table(np.array([]), np.array([]))

    for run in (prefill_only, empty, replace(FOUR, actual_prefill_s=np.full(4, NAN))):
        encoded = msgspec.json.encode(run_metrics(run))
        assert b"NaN" not in encoded
        assert msgspec.json.decode(encoded, type=Metrics[float]) == run_metrics(run)
    assert run_metrics(prefill_only).tpot_attainment is None
    assert run_metrics(prefill_only).slo_attainment is None
    assert run_metrics(prefill_only).ttft_attainment == 0.5
    assert run_metrics(prefill_only).tpot_s.p99 is None
    assert run_metrics(empty).ttft_attainment is None


def test_exact_gaps_take_the_place_of_the_longest_gap_of_each_request() -> None:
    gaps = Gaps(request=np.array([0, 0, 1, 2]), itl_s=np.array([0.01, 0.02, 0.03, 0.5]))

    assert run_metrics(FOUR, gaps=gaps).itl_s.p50 == pytest.approx(0.025)


def test_a_cell_with_one_seed_has_the_means_of_its_run_and_intervals_around_them() -> None:
    run = bursty(0)
    blocks = time_blocks([run])

    cell, plain = cell_metrics([run], blocks), run_metrics(run)

    for name in ("ttft_attainment", "slo_attainment", "goodput_per_s", "output_tokens_per_s", "fluidity"):
        estimate = getattr(cell, name)
        assert estimate.mean == pytest.approx(getattr(plain, name)), name
        assert estimate.low <= estimate.mean <= estimate.high, name
        assert estimate.n == blocks.count
    assert cell.ttft_s.p95 is not None
    assert cell.ttft_s.p95.low is not None
    assert cell.ttft_s.p95.high is not None
    assert cell.ttft_s.p95.low < cell.ttft_s.p95.mean < cell.ttft_s.p95.high


def test_more_seeds_of_the_same_arrivals_do_not_narrow_what_the_arrivals_leave_open() -> None:
    blocks = blocks_of(bursty(0).workload.arrival_s, drain_s=10.0)
    one = cell_metrics([bursty(0)], blocks).ttft_attainment
    twenty = cell_metrics([bursty(seed) for seed in range(20)], blocks).ttft_attainment

    assert one is not None
    assert twenty is not None
    assert one.low is not None
    assert one.high is not None
    assert twenty.low is not None
    assert twenty.high is not None
    assert twenty.high - twenty.low > 0.6 * (one.high - one.low)


def test_blocks_last_three_drains_of_the_late_requests() -> None:
    # whoever arrives from 1,000 s on is served at 1,100 s, in order of arrival
    arrival_s = np.arange(0.0, 6000.0, 10.0)
    ttft_s = np.where((arrival_s >= 1000) & (arrival_s < 1100), 1100.0 - arrival_s, 0.0)

    blocks = time_blocks([table(arrival_s, ttft_s, np.zeros(len(arrival_s)))])

    assert blocks.block_s == pytest.approx(5990.0 / 21)  # drain p90 of 100, 90 ... 10 is 91 s; 273 s fit 21 times


def test_a_lost_request_that_lets_later_ones_pass_does_not_lengthen_the_blocks() -> None:
    arrival_s = np.arange(0.0, 6000.0, 10.0)
    ttft_s = np.where(arrival_s == 1000.0, 4000.0, 1.0)

    assert time_blocks([table(arrival_s, ttft_s, np.zeros(len(arrival_s)))]).count == 99
    assert time_blocks([replace(table(arrival_s, ttft_s), first_token_s=arrival_s + 4000.0)]).count == 10


def test_swapping_the_two_strategies_flips_the_sign() -> None:
    a, b = [bursty(s, 0.8) for s in range(3)], [bursty(s) for s in range(3)]
    blocks = time_blocks(b)

    forth, back = pair_verdict(a, b, blocks), pair_verdict(b, a, blocks)

    assert (forth.verdict, back.verdict) == ("better", "worse")
    assert forth.difference_pp.mean == pytest.approx(-(back.difference_pp.mean or 0.0))
    assert forth.difference_pp.low == pytest.approx(-(back.difference_pp.high or 0.0))


def test_pairing_sees_a_difference_that_the_intervals_of_the_two_cells_hide() -> None:
    a, b = [bursty(s, 0.93) for s in range(3)], [bursty(s) for s in range(3)]
    blocks = time_blocks(b)
    better, worse = cell_metrics(a, blocks).slo_attainment, cell_metrics(b, blocks).slo_attainment

    assert better is not None
    assert worse is not None
    assert (better.low or 0.0) < (worse.high or 0.0)
    assert pair_verdict(a, b, blocks).verdict == "better"


@pytest.mark.parametrize(("seconds", "verdict"), [(3000.0, "no-difference"), (590.0, "too short for an interval")])
def test_a_strategy_against_itself_is_no_difference_if_there_is_time_to_tell(seconds: float, verdict: str) -> None:
    runs = [bursty(0, span_s=seconds)]

    comparison = pair_verdict(runs, runs, blocks_of(runs[0].workload.arrival_s, drain_s=0.0))

    assert comparison.verdict == verdict
    assert comparison.difference_pp.mean == 0.0


def test_runs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InputError, match="2 runs of one strategy and 1 of the other do not pair"):
        pair_verdict([FOUR, FOUR], [FOUR], TimeBlocks(0.0, 60.0, 1))


def test_one_pair_in_twenty_may_be_called_by_chance() -> None:
    counts: dict[Verdict, int] = {"better": 10, "undecided": 30, "too short for an interval": 5}
    pairs = [Comparison(Difference(0.0, 0.0, 0.0), word) for word, count in counts.items() for _ in range(count)]

    assert expected_false(pairs) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("metric", "difference", "verdict", "words"),
    [
        (
            "ttft_attainment",
            Difference(-4.91, -7.0, -2.0),
            "worse",
            "a met TTFT less often than b: -4.9 points (-7.0 to -2.0) at load 0.9 of t, fixed:2",
        ),
        (
            "slo_attainment",
            Difference(0.1, -0.3, 0.5),
            "no-difference",
            "a and b met TTFT and TPOT equally often, within 1 point: +0.1 points (-0.3 to +0.5)"
            " at load 0.9 of t, fixed:2",
        ),
        (
            "tpot_attainment",
            Difference(1.2, -0.8, 3.2),
            "undecided",
            "no difference shown between a and b in meeting TPOT: +1.2 points (-0.8 to +3.2) at load 0.9 of t, fixed:2",
        ),
        (
            "slo_attainment",
            Difference(4.9, None, None),
            "too short for an interval",
            "a against b in meeting TTFT and TPOT: +4.9 points at load 0.9 of t, fixed:2, too short for an interval",
        ),
    ],
)
def test_each_verdict_has_its_sentence(metric: Metric, difference: Difference, verdict: Verdict, words: str) -> None:
    assert sentence(Pair("t", "fixed:2", 0.9, "a", "b", metric, difference, verdict)) == words


def test_a_whole_cell_of_five_seeds_and_fifty_tenants_takes_well_under_a_second() -> None:
    rng = np.random.default_rng(3)
    n = 9000
    runs = [
        table(
            np.sort(rng.uniform(0, 3000, n)),
            rng.exponential(1.0, n),
            tenant=[f"t{i}" for i in rng.integers(0, 80, n)],
            prompt_tokens=rng.integers(1, 10_000, n),
        )
        for _ in range(5)
    ]
    blocks = time_blocks(runs)

    started = time.perf_counter()
    cell_metrics(runs, blocks)

    assert time.perf_counter() - started < 3.0  # about 0.6 s alone; the machine may be shared
