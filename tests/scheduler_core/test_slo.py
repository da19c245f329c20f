"""What a promise means in numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos.scheduler_core import slo

times = st.floats(0, 1e6)


def test_the_first_token_is_due_a_target_after_arrival_and_the_others_a_target_apart() -> None:
    assert slo.ttft_deadline_s(arrival_s=3.0, ttft_target_s=2.0) == 5.0
    assert [slo.token_deadline_s(first_token_s=5.0, tpot_target_s=0.25, k=k) for k in (0, 1, 4)] == [5.0, 5.25, 6.0]


@given(now_s=times, work_s=times, deadline_s=times, later_s=times)
def test_who_is_lost_stays_lost(now_s: float, work_s: float, deadline_s: float, later_s: float) -> None:
    lost = slo.is_lost(now_s, work_s, deadline_s)

    assert not lost or slo.is_lost(now_s + later_s, work_s, deadline_s)


def test_a_first_token_exactly_at_the_deadline_is_in_time() -> None:
    assert not slo.is_lost(1.0, 1.0, 2.0)
    assert slo.is_lost(1.0, 1.0, math.nextafter(2.0, 0.0))
    assert slo.ttft_met(np.array([2.0, 2.1, math.nan]), np.array([2.0, 2.0, 2.0])).tolist() == [True, False, False]


@given(now_s=times, work_s=times)
def test_without_a_target_nobody_is_ever_lost(now_s: float, work_s: float) -> None:
    assert not slo.is_lost(now_s, work_s, slo.ttft_deadline_s(0.0, slo.NO_TARGET_S))


def test_time_per_output_token_is_the_mean_gap_of_scalars_and_arrays_alike() -> None:
    assert slo.tpot_s(1.0, 3.0, 5.0) == 0.5
    assert slo.tpot_s(np.array([0.0, 1.0]), np.array([1.0, 3.0]), np.array([2.0, 5.0])).tolist() == [1.0, 0.5]


def test_tpot_is_met_by_a_finished_request_within_its_target_or_with_a_single_token() -> None:
    met = slo.tpot_met(
        tpot=np.array([0.05, 0.06, math.nan, 0.01, math.nan]),
        tpot_target_s=np.full(5, 0.05),
        output_tokens=np.array([9.0, 9.0, 1.0, 9.0, 9.0]),
        finished=np.array([True, True, True, False, True]),
    )

    assert met.tolist() == [True, False, True, False, False]


def test_attainment_is_over_all_that_were_submitted() -> None:
    assert slo.attainment(np.array([True, False, False, True])) == 0.5
    assert math.isnan(slo.attainment(np.array([], dtype=bool)))


def test_goodput_counts_met_requests_per_second() -> None:
    assert slo.goodput_per_s(np.array([True, False, True]), span_s=4.0) == 0.5
    assert math.isnan(slo.goodput_per_s(np.array([True]), span_s=0.0))


@pytest.mark.parametrize("k", range(3))
def test_a_token_deadline_without_a_target_is_never(k: int) -> None:
    assert slo.token_deadline_s(1.0, slo.NO_TARGET_S, k + 1) == math.inf
