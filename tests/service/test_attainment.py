"""Attainment and prediction error as metrics: what is counted, for whom, and that series stay few."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos.scheduler_core.service.attainment import MOST_TENANTS, Busiest, Outcomes, kept_promises
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.telemetry import RequestRow


def request(**fields: Any) -> RequestRow:
    """A request that kept both its promises."""
    load = {"input_tokens": 100, "prefix_hit_ratio": 0, "kv_cache_usage": 0, "requests_running": 0}
    load |= {"requests_waiting": 0, "prefill_tokens_in_flight": 0, "decode_tokens_in_flight": 0, "output_tokens": 10}
    times = {"ttft_ms": 900.0, "ttft_target_ms": 1000.0, "tpot_ms": 40.0, "tpot_target_ms": 50.0}
    return RequestRow(**{**load, **times, "tenant": "acme", **fields})


def counted(rows: list[RequestRow]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Requests and those that met, by class, tenant and promise."""
    metrics = Metrics()
    Outcomes(metrics, lambda: ["default", "batch"]).note(rows)
    return series(metrics)


def series(metrics: Metrics) -> dict[tuple[str, str, str], tuple[float, float]]:
    found: dict[str, dict[tuple[str, str, str], float]] = {
        "kairos_slo_requests_total": {},
        "kairos_slo_requests_met_total": {},
    }
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name in found:
                labels = sample.labels
                found[sample.name][labels["slo_class"], labels["tenant"], labels["promise"]] = sample.value
    all_of, met = found.values()
    return {key: (value, met[key]) for key, value in all_of.items()}


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {"ttft": True, "tpot": True, "end_to_end": True}),
        ({"ttft_ms": 1000.0}, {"ttft": True, "tpot": True, "end_to_end": True}),
        ({"ttft_ms": 1000.1}, {"ttft": False, "tpot": True, "end_to_end": False}),
        ({"tpot_ms": 51.0}, {"ttft": True, "tpot": False, "end_to_end": False}),
        ({"ttft_target_ms": None, "ttft_ms": 9e6}, {"tpot": True, "end_to_end": True}),
        ({"tpot_target_ms": None, "tpot_ms": 9e6}, {"ttft": True, "end_to_end": True}),
        ({"ttft_target_ms": None, "tpot_target_ms": None}, {}),
        ({"tpot_ms": None, "output_tokens": 1}, {"ttft": True, "tpot": True, "end_to_end": True}),
        ({"tpot_ms": None}, {"ttft": True, "tpot": False, "end_to_end": False}),
        ({"ttft_ms": None}, {"ttft": False, "tpot": True, "end_to_end": False}),
        ({"status": "failed"}, {"ttft": False, "tpot": False, "end_to_end": False}),
        ({"status": "rejected", "ttft_ms": None, "tpot_ms": None}, {"ttft": False, "tpot": False, "end_to_end": False}),
    ],
)
def test_each_promise_is_judged_by_itself_and_only_where_there_is_one(
    fields: dict[str, Any], kept: dict[str, bool]
) -> None:
    found = {promise: bool(k.met[0]) for promise, k in kept_promises([request(**fields)]).items() if k.had[0]}

    assert found == kept


def test_requests_are_counted_by_class_and_tenant() -> None:
    rows = [request(), request(ttft_ms=2000.0), request(slo_class="batch", tenant=""), request(slo_class="gold")]

    assert {key: both for key, both in counted(rows).items() if key[2] == "ttft"} == {
        ("default", "acme", "ttft"): (2, 1),
        ("batch", "none", "ttft"): (1, 1),
        ("other", "acme", "ttft"): (1, 1),
    }


def test_a_thousand_tenants_have_the_series_of_fifty_and_one_for_the_rest() -> None:
    rows = [request(tenant=f"t{number}") for number in range(1_000)]

    found = counted(rows)

    tenants = {tenant for _, tenant, _ in found}
    assert len(tenants) == MOST_TENANTS + 1
    assert found["default", "other", "ttft"] == (1_000 - MOST_TENANTS, 1_000 - MOST_TENANTS)


def test_a_busy_tenant_gets_series_of_its_own_and_the_least_busy_one_loses_them() -> None:
    metrics = Metrics()
    outcomes = Outcomes(metrics, lambda: ["default"])
    outcomes.note([request(tenant=f"t{number}") for number in range(MOST_TENANTS)] + [request(tenant="t0")] * 5)
    for _ in range(4):
        outcomes.note([request(tenant="busy")])
    found = {tenant: both[0] for (_, tenant, promise), both in series(metrics).items() if promise == "ttft"}

    assert found["t0"] == 6
    assert (found["other"], found["busy"]) == (2, 2)
    assert len(found) == MOST_TENANTS + 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=200))
def test_the_shown_are_never_more_than_allowed_and_every_count_is_somewhere(seen: list[tuple[int, int]]) -> None:
    left: list[int] = []
    busiest: Busiest[int] = Busiest(3, left.append)
    shown: Counter[int] = Counter()
    other = 0
    for key, count in seen:
        before = len(left)
        if busiest.shows(key, count):
            shown[key] += count
        else:
            other += count
        for gone in left[before:]:
            other += shown.pop(gone)

    assert len(shown) <= 3
    assert sum(shown.values()) + other == sum(count for _, count in seen)


def test_whoever_is_busy_for_long_is_shown_however_many_others_there_are() -> None:
    busiest: Busiest[int] = Busiest(2, lambda key: None)
    for number in range(20_000):
        busiest.shows(number, 1)
        busiest.shows(-1, 1)

    assert busiest.shows(-1, 1)


def test_the_error_of_predictions_is_a_histogram_by_profile_and_model() -> None:
    metrics = Metrics()
    predicted = {"predicted_ttft_ms": 600.0, "predicted_tpot_ms": None, "model_version": "p@3"}
    Outcomes(metrics, lambda: ["default"]).note([request(gpu="H100", model="org/m", **predicted)] * 2)

    labels = {"profile": "h100_org-m__1_1_", "model_version": "p@3", "time": "ttft"}
    value = metrics.registry.get_sample_value
    assert value("kairos_prediction_ratio_count", labels) == 2
    assert value("kairos_prediction_ratio_sum", labels) == pytest.approx(3.0)
    assert value("kairos_prediction_ratio_bucket", labels | {"le": "1.2"}) == 0
    assert value("kairos_prediction_ratio_bucket", labels | {"le": "1.5"}) == 2
    assert value("kairos_prediction_ratio_count", labels | {"time": "tpot"}) is None
