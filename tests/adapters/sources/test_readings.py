"""What engines say becomes samples: names, differences, restarts, and what is not there."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_engines import loads_text, sglang_text, vllm_text

from kairos.adapters.sources.loads import reading_of_loads
from kairos.adapters.sources.metrics import SGLANG, VLLM, reading_of_metrics
from kairos.adapters.sources.readings import Reading, sample_of
from kairos.scheduler_core.errors import TelemetryError
from kairos.scheduler_core.telemetry import SampleRow


def vllm(**figures: float) -> Reading:
    return reading_of_metrics(VLLM, vllm_text(**figures).encode())


def between(before: Reading | None, after: Reading) -> SampleRow:
    return sample_of("decode-0", "vllm", 1.7e9, after, before, 2.0)


def test_a_first_sample_tells_the_moment_and_nothing_of_the_time_before() -> None:
    sample = between(None, vllm(prompt=900.0, finished=4.0, ttft=1.0))

    assert (sample.requests_running, sample.requests_waiting, sample.kv_cache_usage) == (5, 7, 0.5)
    assert (sample.interval_s, sample.prompt_tokens, sample.ttft_ms, sample.preemptions) == (None, None, None, None)


def test_the_time_between_two_is_told_by_differences() -> None:
    before = vllm(prompt=1000.0, hits=100.0, generated=50.0, finished=4.0, ttft=1.0, itl=2.0, preempted=1.0)
    after = vllm(prompt=1400.0, hits=200.0, generated=90.0, finished=8.0, ttft=1.5, itl=3.0, preempted=4.0, expired=2.0)
    sample = between(before, after)

    assert sample.interval_s == 2.0
    assert (sample.prompt_tokens, sample.output_tokens, sample.finished_requests) == (400, 40, 4)
    assert (sample.preemptions, sample.kv_expired, sample.failed_transfers) == (3, 2, None)
    assert (sample.prefix_hit_ratio, sample.ttft_ms, sample.itl_ms) == pytest.approx((0.25, 125.0, 25.0))
    assert sample.e2e_ms is None  # a series that is not there


def test_where_nothing_happened_there_is_no_mean() -> None:
    same = vllm(prompt=10.0, finished=4.0, ttft=1.0)
    sample = between(same, same)

    assert (sample.finished_requests, sample.ttft_ms, sample.prefix_hit_ratio) == (0, None, None)


def test_after_a_restart_the_moment_is_told_and_no_difference() -> None:
    before, after = vllm(prompt=1000.0, generated=50.0), vllm(prompt=20.0, generated=60.0)
    sample = between(before, after)

    assert (sample.requests_running, sample.interval_s, sample.output_tokens) == (5, None, None)


def test_sglang_has_names_of_its_own() -> None:
    first = sglang_text(prompt=100.0, cached=10.0, e2e=4.0, finished=2.0)
    second = sglang_text(prompt=300.0, cached=110.0, e2e=10.0, finished=4.0)
    before, after = (reading_of_metrics(SGLANG, text.encode()) for text in (first, second))
    sample = between(before, after)

    assert (sample.requests_running, sample.requests_waiting, sample.kv_cache_usage) == (4, 2, 0.5)
    assert (sample.prompt_tokens, sample.output_tokens, sample.preemptions) == (200, 0, None)
    assert (sample.prefix_hit_ratio, sample.e2e_ms) == (0.5, 3000.0)


def test_loads_tell_the_mean_step_between_two() -> None:
    before, after = (
        reading_of_loads(loads_text(100, 900, 2_000_000)),
        reading_of_loads(loads_text(300, 2500, 6_000_000)),
    )
    sample = between(before, after)

    assert (sample.requests_running, sample.requests_waiting, sample.kv_cache_usage) == (8, 1, 0.5)
    assert (sample.decode_steps, sample.decode_batch, sample.decode_step_ms) == (200, 8.0, 20.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<html>404</html>", "no Prometheus text"),
        ('vllm:num_requests_running{engine="0 3', "no Prometheus text"),
        ("vllm:num_requests_running three\n", "no Prometheus text"),
        ("", "no series of this engine"),
        (sglang_text(), "no series of this engine"),
        ("vllm:num_requests_running NaN\n", "no series of this engine"),
    ],
)
def test_what_is_no_metrics_of_the_engine_is_said(text: str, says: str) -> None:
    with pytest.raises(TelemetryError, match=says):
        reading_of_metrics(VLLM, text.encode())


@pytest.mark.parametrize("body", [b"", b"[]", b'{"loads": 7}', b'{"loads": [{"num_running_reqs": "many"}]}', b"\xff"])
def test_what_is_no_loads_is_said(body: bytes) -> None:
    with pytest.raises(TelemetryError, match="its loads cannot be read"):
        reading_of_loads(body)


FIGURES = st.fixed_dictionaries(
    {name: st.floats(0, 1e12) for name in ("prompt", "generated", "preempted", "finished", "hits", "ttft", "expired")}
)


@given(before=FIGURES, after=FIGURES)
def test_whatever_an_engine_counts_a_sample_is_one_that_can_be(
    before: dict[str, float], after: dict[str, float]
) -> None:
    sample = between(vllm(**before), vllm(**after))
    numbers = [getattr(sample, name) for name in SampleRow.__struct_fields__]

    assert all(math.isfinite(n) and n >= 0 for n in numbers if isinstance(n, int | float))
    assert sample.prefix_hit_ratio is None or sample.prefix_hit_ratio <= 1
