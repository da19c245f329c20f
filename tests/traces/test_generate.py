"""Synthetic traces: what they imitate, that they say so, and that a seed fixes them."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from kairos.adapters.traces import Trace, describe, read_trace, write_trace
from kairos.adapters.traces.generate import generate, known_statistics
from kairos.scheduler_core.errors import TraceError, UnknownNameError

NAMES = sorted(known_statistics())
RECORDED = {"servegen_r1": "servegen_r1_resampled"}


def same(a: Trace, b: Trace) -> bool:
    return (
        np.array_equal(a.arrival_s, b.arrival_s)
        and np.array_equal(a.prompt_tokens, b.prompt_tokens)
        and np.array_equal(a.output_tokens, b.output_tokens)
        and a.block_ids == b.block_ids
    )


def test_the_four_reference_traces_can_be_imitated() -> None:
    assert NAMES == ["azure2023_code", "azure2023_conv", "mooncake_conversation", "servegen_r1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_a_trace_and_another_seed_gives_another(name: str) -> None:
    assert same(generate(name, 60, seed=5), generate(name, 60, seed=5))
    assert not same(generate(name, 60, seed=5), generate(name, 60, seed=6))


@pytest.mark.parametrize("name", NAMES)
def test_a_synthetic_trace_says_so_also_after_a_rename(name: str, tmp_path: Path) -> None:
    trace = generate(name, 60, seed=0)
    write_trace(trace, tmp_path / "renamed.csv.gz")

    assert trace.name == f"synthetic_{name}"
    assert trace.synthetic
    assert read_trace(tmp_path / "renamed.csv.gz").synthetic


@pytest.mark.parametrize("name", NAMES)
def test_arrivals_ascend_within_the_duration(name: str) -> None:
    arrival_s = generate(name, 100, seed=1).arrival_s

    assert np.all(np.diff(arrival_s) >= 0)
    assert 0 <= arrival_s[0] <= arrival_s[-1] < 100


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_scales_time_and_nothing_else(name: str) -> None:
    recorded = generate(name, 300, seed=2)
    factor = 4.0
    rate_per_s = known_statistics()[name].arrivals.rate_per_s * factor

    fast = generate(name, 300 / factor, seed=2, rate_per_s=rate_per_s)

    assert np.allclose(fast.arrival_s * factor, recorded.arrival_s)
    assert np.array_equal(fast.prompt_tokens, recorded.prompt_tokens)
    assert fast.block_ids == recorded.block_ids


def test_blocks_cover_each_prompt_and_all_begin_with_the_system_prompts_block() -> None:
    trace = generate("mooncake_conversation", 300, seed=0)
    assert trace.block_ids is not None

    assert [len(ids) for ids in trace.block_ids] == (-(-trace.prompt_tokens // 512)).tolist()
    assert {ids[0] for ids in trace.block_ids} == {0}
    assert all(len(set(ids)) == len(ids) for ids in trace.block_ids)


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA is not set")
@pytest.mark.parametrize("name", NAMES)
def test_a_long_synthetic_trace_has_the_figures_of_the_recorded_one(name: str) -> None:
    path = Path(os.environ["KAIROS_DATA"]) / "traces" / f"{RECORDED.get(name, name)}.csv.gz"
    recorded = describe(read_trace(path))

    drawn = describe(generate(name, 8_000, seed=0))

    assert drawn.rate_per_s == pytest.approx(recorded.rate_per_s, rel=0.15)
    assert drawn.idc_1s == pytest.approx(recorded.idc_1s, rel=0.25)
    for ours, theirs in ((drawn.input_tokens, recorded.input_tokens), (drawn.output_tokens, recorded.output_tokens)):
        assert ours.p50 == pytest.approx(theirs.p50, rel=0.1)
        assert ours.p90 == pytest.approx(theirs.p90, rel=0.1)
        assert ours.p99 == pytest.approx(theirs.p99, rel=0.2)
        assert ours.max <= theirs.max
    assert math.isnan(drawn.block_hit_share) == math.isnan(recorded.block_hit_share)
    if not math.isnan(recorded.block_hit_share):
        assert drawn.block_hit_share == pytest.approx(recorded.block_hit_share, abs=0.05)


def test_bursts_of_azures_code_trace_last_for_minutes() -> None:
    drawn = describe(generate("azure2023_code", 8_000, seed=0))

    assert drawn.idc_60s > 8 * drawn.idc_1s  # recorded: 154 and 13; independent seconds would have 13 and 13


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'azure2023_code'"):
        generate("azure2023_cod", 60, seed=0)


@pytest.mark.parametrize(
    ("duration_s", "rate_per_s"), [(0, None), (-1, None), (math.nan, None), (60, 0), (60, math.inf)]
)
def test_a_duration_or_rate_that_is_no_positive_number_is_refused(duration_s: float, rate_per_s: float | None) -> None:
    with pytest.raises(TraceError, match="is not possible; give a positive number"):
        generate("azure2023_conv", duration_s, seed=0, rate_per_s=rate_per_s)


def test_a_trace_without_a_request_is_refused() -> None:
    with pytest.raises(TraceError, match="nothing arrives in 1e-06 s"):
        generate("azure2023_conv", 1e-6, seed=0)
