"""What always holds of reservations: load is the sum of the live ones, progress merges in any order."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.scheduler_core.service.managed.book import REMEMBER_S, Book
from kairos.scheduler_core.service.managed.load import Load, share_of
from kairos.scheduler_core.service.managed.reservation import End, Met, Progress, Reservation, Terms, telemetry_of
from kairos.scheduler_core.slo import NO_TARGET_S

HOW = ("finished", "failed", "released", "instance_gone")


def terms(request_id: str, **fields: Any) -> Terms:
    """What was settled about a request of 1,000 tokens."""
    told: dict[str, Any] = {
        "request_id": request_id,
        "digest": "d",
        "decision_id": "x",
        "arrival_s": 0.0,
        "ttl_s": 10.0,
        "prompt_tokens": 1_000,
        "cached_tokens": 0,
        "tenant": "",
        "slo_class": "default",
        "ttft_target_s": 10.0,
        "tpot_target_s": 0.05,
        "prefill_instance": "p-0",
        "decode_instance": "d-0",
        "predicted_prefill_s": 1.0,
        "predicted_ttft_s": 1.0,
        "predicted_tpot_s": 0.01,
        "strategy": "kairos",
        "model_version": "linear",
        "profile": ("H100", "m", "", 1, 1, "vllm"),
        "met": Met(0, 0, 0, 0, 0.0),
    }
    return Terms(**(told | fields))


times = st.none() | st.integers(0, 20).map(float)
ends = st.builds(lambda at_s, how: End(False, at_s, how), st.integers(0, 20).map(float), st.sampled_from(HOW))
expiries = st.builds(lambda at_s: End(True, at_s, "expired"), st.integers(0, 20).map(float))
progresses = st.builds(
    Progress, st.integers(5, 30).map(float), times, times, times, times, st.integers(0, 50), st.none() | ends | expiries
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(progresses, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_is_told_of_a_request_merges_to_the_same_in_any_order_and_twice(
    told: list[Progress], draw: random.Random
) -> None:
    def all_of(states: list[Progress]) -> Progress:
        merged = states[0]
        for state in states[1:]:
            merged = merged.merged(state)
        return merged

    shuffled = told + draw.sample(told, draw.randint(0, len(told)))
    draw.shuffle(shuffled)

    assert all_of(shuffled) == all_of(told)


reservations = st.builds(
    lambda n, prompt, cached, prefill, decode, seconds, tpot, progress: Reservation(
        terms(
            f"r-{n}",
            prompt_tokens=prompt,
            cached_tokens=min(cached, prompt - 1),
            prefill_instance=f"p-{prefill}",
            decode_instance=f"d-{decode}" if decode < 2 else "",
            predicted_prefill_s=seconds,
            tpot_target_s=tpot,
        ),
        progress,
    ),
    st.integers(0, 5),
    st.integers(1, 9_000),
    st.integers(0, 9_000),
    st.integers(0, 1),
    st.integers(0, 2),
    st.floats(0, 100),
    st.none() | st.sampled_from([0.02, 0.05, 0.1]),
    progresses,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(reservations, max_size=25))
def test_load_is_the_sum_of_the_live_reservations_whatever_happened_before(told: list[Reservation]) -> None:
    load = Load()
    for reservation in told:
        load.put(reservation)

    live = [share for last in {r.terms.request_id: r for r in told}.values() if (share := share_of(last)) is not None]
    assert len(load) == len(live)
    for name in ("p-0", "p-1"):
        mine, totals = [s for s in live if s.prefill_instance == name], load.on_prefill(name)
        assert (totals.requests, totals.tokens, totals.work_ns) == (
            len(mine), sum(s.prefill_tokens for s in mine), sum(s.prefill_ns for s in mine),
        )  # fmt: skip
        assert totals.running == sum(s.started_s is not None for s in mine)
    for name in ("d-0", "d-1"):
        there, sums = [s for s in live if s.decode_instance == name], load.on_decode(name)
        assert (sums.batch_size, sums.waiting_requests) == (
            sum(s.resident for s in there), sum(not s.resident for s in there),
        )  # fmt: skip
        assert sums.sum_context_tokens + sums.waiting_tokens == sum(s.context_tokens for s in there)
        assert sums.tightest_tpot_s == min((s.tpot_target_s for s in there), default=NO_TARGET_S)
        assert name not in load.members or len(load.members[name]) == len(there)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=20))
def test_a_reservation_is_load_until_it_expires_and_no_longer(heard: list[tuple[int, int]]) -> None:
    book = Book()
    expires_s: dict[str, float] = {}
    for n, until_s in heard:
        book.put(Reservation(terms(f"r-{n}"), Progress(float(until_s))))
        expires_s[f"r-{n}"] = max(expires_s.get(f"r-{n}", 0.0), float(until_s))
    for now_s in range(0, 55, 5):
        ended = {r.terms.request_id for r in book.expire(float(now_s))}
        live = {name for name, at_s in expires_s.items() if at_s > now_s}

        assert {r.terms.request_id for r in book.on("p-0")} == live
        assert not ended & live
    book.expire(60.0 + REMEMBER_S)

    assert all(book.get(name) is None for name in expires_s)


def test_an_expiry_is_none_once_something_was_heard_since() -> None:
    expired = Progress(5.0, end=End(True, 5.0, "expired"))
    heard = Progress(14.0, first_token_s=4.0)
    finished = Progress(15.0, end=End(False, 9.0, "finished"))

    assert expired.holds == expired.end
    assert expired.merged(heard).holds is None
    assert expired.merged(finished).holds == finished.end


def test_what_was_released_or_expired_is_no_telemetry() -> None:
    for how in ("released", "expired"):
        ended = Reservation(terms("a"), Progress(1.0, end=End(how == "expired", 2.0, how)))

        assert telemetry_of(ended) is None


def test_the_prompt_that_runs_counts_less_the_longer_it_ran() -> None:
    load = Load()
    load.put(Reservation(terms("a", predicted_prefill_s=2.0), Progress(99.0, prefill_started_s=10.0)))
    load.put(Reservation(terms("b", predicted_prefill_s=1.0), Progress(99.0)))
    totals = load.on_prefill("p-0")

    assert [totals.outstanding_s(now_s) for now_s in (10.0, 10.5, 12.0, 50.0)] == [3.0, 2.5, 1.0, 1.0]
