"""The figures of a trace, by hand and against the data pack's own table."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from kairos.adapters.traces import Trace, describe, read_trace


def trace_of(arrival_s: list[float], **columns: object) -> Trace:
    n = len(arrival_s)
    return Trace("t", np.array(arrival_s), np.full(n, 512), np.full(n, 10), **columns)  # type: ignore[arg-type]


def test_figures_of_a_small_trace_are_those_worked_out_by_hand() -> None:
    # gaps 0, 1, 3: mean 4/3, deviation sqrt(14)/3; per second 2, 1, 0, 0, 1: mean 0.8, variance 0.56
    description = describe(trace_of([10.0, 10.0, 11.0, 14.0]))

    assert (description.requests, description.span_s, description.rate_per_s) == (4, 4.0, 1.0)
    assert description.gap_cv == pytest.approx(math.sqrt(14) / 4)
    assert description.idc_1s == pytest.approx(0.7)
    assert (description.peak_per_s, description.peak_minute_over_mean) == (2, 1.0)
    assert math.isnan(description.block_hit_share)


def test_the_order_of_rows_does_not_change_the_figures() -> None:
    blocks: list[tuple[int, ...]] = [(0, 1), (0, 1), (0, 2)]
    sorted_rows = describe(trace_of([0.0, 1.0, 2.0], block_ids=blocks, block_tokens=256))
    shuffled = describe(trace_of([2.0, 0.0, 1.0], block_ids=[blocks[2], *blocks[:2]], block_tokens=256))

    assert sorted_rows == shuffled


def test_the_hit_share_counts_leading_blocks_that_an_earlier_request_brought() -> None:
    # new 0 1; both known; 0 known and 9 new, so the 1 after it is no prefix hit
    trace = trace_of([0.0, 1.0, 2.0], block_ids=[(0, 1), (0, 1), (0, 9, 1)], block_tokens=256)

    assert describe(trace).block_hit_share == pytest.approx(3 / 7)


def test_a_single_request_has_no_rate_and_no_gaps() -> None:
    description = describe(trace_of([3.0]))

    assert (description.requests, description.span_s, description.peak_per_s) == (1, 0.0, 1)
    assert math.isnan(description.rate_per_s)
    assert math.isnan(description.gap_cv)


# name: req/s, CV of gaps, IDC 1 s, IDC 60 s, peak, busiest minute, input p50/p90/p99/max, output likewise, hit share
README_TABLE = {
    "mooncake_conversation": (
        *(3.31, 2.99, 7.7, 5.2, 23, 1.27),
        *((7121, 27582, 87386, 124847), (355, 605, 1181, 2000), 0.353),
    ),
    "mooncake_synthetic": (
        *(3.91, 1.01, 1.1, 13.0, 13, 1.23),
        *((11587, 38611, 66456, 191378), (69, 389, 768, 893), 0.640),
    ),
    "azure2023_code": (3.00, 12.61, 13.0, 154, 67, 3.52, (1463, 5184, 7436, 7437), (13, 55, 248, 1899), None),
    "azure2023_conv": (5.89, 1.08, 1.3, 14.1, 16, 1.44, (1014, 3839, 4127, 14050), (115, 421, 598, 1000), None),
    "servegen_r1_resampled": (
        *(9.24, 1.06, 1.4, 2.7, 35, 1.15),
        *((267, 7105, 29619, 56385), (659, 1861, 13065, 25633), None),
    ),
}


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA is not set")
@pytest.mark.parametrize("name", README_TABLE)
def test_the_figures_of_the_data_pack_are_those_of_its_readme(name: str) -> None:
    rate, cv, idc_1s, idc_60s, peak, minute, inputs, outputs, hits = README_TABLE[name]

    d = describe(read_trace(Path(os.environ["KAIROS_DATA"]) / "traces" / f"{name}.csv.gz"))

    assert (round(d.rate_per_s, 2), round(d.gap_cv, 2), d.peak_per_s) == (rate, cv, peak)
    assert d.idc_1s == pytest.approx(idc_1s, abs=0.051)
    assert d.idc_60s == pytest.approx(idc_60s, rel=0.01)
    assert round(d.peak_minute_over_mean, 2) == minute
    for quantiles, table in ((d.input_tokens, inputs), (d.output_tokens, outputs)):
        assert tuple(int(q) for q in (quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max)) == table
    assert (None if math.isnan(d.block_hit_share) else round(d.block_hit_share, 3)) == hits
