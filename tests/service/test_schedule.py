"""What `/schedule` answers: who runs next and where, in which order, when it is predicted to be done, and why."""

from pathlib import Path
from typing import Any

import pytest
from service.snapshots import (
    PROFILES,
    answered,
    decode,
    order_on,
    prefill,
    settings_of,
    snapshot,
    waits,
)

from kairos.predictors.artifact import ProfileModels, save
from kairos.predictors.step_model import model_of_line
from kairos.scheduler_core.domain import Line, Profile
from kairos.scheduler_core.telemetry import StepKind

FCFS = "fcfs+late+least-requests+continuous"


def entry(answer: Any, request_id: str | int) -> Any:
    return next(e for e in answer["prefill"] if e["request_id"] == request_id)


# -- prefill


def test_the_first_of_the_order_starts_and_the_others_wait_behind_it() -> None:
    # 1 s, 2 s and 3 s of work in arrival order: done at 1, 3 and 6
    body = snapshot(prefill(), strategy=FCFS, waiting=[waits("a"), waits("b", 2_000), waits("c", 3_000)])

    answer = answered(body)

    assert order_on(answer) == ["a", "b", "c"]
    assert [entry(answer, r)["predicted_ttft_s"] for r in "abc"] == [1.0, 3.0, 6.0]
    assert [entry(answer, r)["reason"]["code"] for r in "abc"] == [
        "runs_next",
        "waits_behind_more_urgent_work",
        "waits_behind_more_urgent_work",
    ]


def test_the_reason_says_how_long_a_request_waited_and_what_runs_before_it() -> None:
    waiting = [waits("a", 2_000, -3.0), waits("b", 1_000, -1.0)]

    reason = entry(answered(snapshot(prefill(), strategy=FCFS, waiting=waiting)), "b")["reason"]

    # deadline -1 + 10 = 9, less 1 s of work
    assert reason == {
        "code": "waits_behind_more_urgent_work",
        "chosen_by": None,
        "waited_s": 1.0,
        "laxity_s": 8.0,
        "ahead_requests": 1,
        "ahead_s": 2.0,
    }


def test_only_differences_of_times_matter() -> None:
    def at(origin_s: float) -> Any:
        waiting = [waits("a", 2_000, origin_s - 3.0), waits("b", 4_000, origin_s - 1.0, ttft_target_s=5.5)]
        answer = answered(snapshot(prefill(), waiting=waiting) | {"now_s": origin_s})
        return [(e["request_id"], e["order"], e["on_time"], round(e["predicted_ttft_s"], 6)) for e in answer["prefill"]]

    assert at(0.0) == at(1_750_000_000.0)


def test_under_late_binding_a_request_goes_to_the_instance_that_is_free_first() -> None:
    fleet = prefill("prefill-0", free_in_s=5.0), prefill("prefill-1", free_in_s=1.0)

    answer = answered(snapshot(*fleet, strategy=FCFS, waiting=[waits("a", 3_000), waits("b"), waits("c")]))

    # prefill-1: a from 1 to 4, then b from 4 to 5; at 5 both are free, the first takes c
    assert order_on(answer, "prefill-1") == ["a", "b"]
    assert order_on(answer, "prefill-0") == ["c"]
    assert entry(answer, "c")["predicted_ttft_s"] == 6.0


def test_round_robin_deals_out_and_the_state_remembers_whose_turn_it_is() -> None:
    fleet = prefill("prefill-0"), prefill("prefill-1")
    body = snapshot(*fleet, strategy="fcfs+round-robin+least-requests+continuous")
    first = answered(body | {"waiting": [waits("a")]})

    second = answered(body | {"waiting": [waits("b")], "state": first["state"]})

    assert entry(first, "a")["instance_id"] == "prefill-0"
    assert entry(second, "b")["instance_id"] == "prefill-1"


def test_a_bound_request_stays_where_it_is() -> None:
    fleet = prefill("prefill-0"), prefill("prefill-1")
    waiting = [waits("a", instance_id="prefill-1"), waits("b", instance_id="prefill-1")]

    assert order_on(answered(snapshot(*fleet, waiting=waiting)), "prefill-1") == ["a", "b"]


def test_an_unfinished_prompt_goes_on_unless_the_rule_preempts() -> None:
    waiting = [waits("long", 9_000, prefilled_tokens=1_000, instance_id="prefill-0"), waits("short", 100)]
    body = snapshot(prefill(chunk_tokens=1_000), waiting=waiting)

    goes_on = answered(body | {"strategy": "sjf+late+least-requests+continuous"})
    yields = answered(body | {"strategy": "sjf(preempt=true)+late+least-requests+continuous"})

    assert (order_on(goes_on)[0], entry(goes_on, "long")["reason"]["chosen_by"]) == ("long", "continues")
    assert (order_on(yields)[0], entry(yields, "short")["reason"]["chosen_by"]) == ("short", "policy")


def test_a_step_takes_no_more_than_the_chunk_budget() -> None:
    answer = answered(snapshot(prefill(chunk_tokens=1_000), strategy=FCFS, waiting=[waits("a", 2_500)]))

    assert entry(answer, "a")["step_tokens"] == 1_000
    assert entry(answer, "a")["predicted_ttft_s"] == 2.5


def test_the_step_in_flight_is_predicted_from_what_runs_when_its_end_is_not_told() -> None:
    running = [{"request_id": "r", "instance_id": "prefill-0", "arrival_s": 0.0, "prompt_tokens": 4_000}]

    answer = answered(snapshot(prefill(), strategy=FCFS, running=running, waiting=[waits("a")]))

    assert entry(answer, "a")["predicted_ttft_s"] == 5.0
    assert entry(answer, "a")["reason"]["ahead_s"] == 4.0
    assert entry(answer, "a")["step_tokens"] == 0


def test_what_a_chunk_leaves_of_a_running_prompt_counts_as_work_ahead() -> None:
    running = [
        {
            "request_id": "r",
            "instance_id": "prefill-0",
            "arrival_s": -1.0,
            "prompt_tokens": 3_000,
            "step_tokens": 1_000,
        }
    ]
    body = snapshot(prefill(chunk_tokens=1_000, free_in_s=0.5), strategy=FCFS, running=running, waiting=[waits("a")])

    answer = answered(body)

    assert [e["request_id"] for e in answer["prefill"]] == ["a"]
    assert entry(answer, "a")["predicted_ttft_s"] == 0.5 + 2.0 + 1.0


def test_cached_tokens_are_not_computed_and_may_differ_by_instance() -> None:
    fleet = prefill("prefill-0"), prefill("prefill-1")
    waiting = [waits("a", 4_000, cached_tokens_by_instance={"prefill-1": 3_000})]
    body = snapshot(*fleet, strategy="fcfs+prefix-affinity+least-requests+continuous", waiting=waiting)

    answer = answered(body)

    assert entry(answer, "a")["instance_id"] == "prefill-1"
    assert entry(answer, "a")["predicted_prefill_s"] == 1.0


@pytest.mark.parametrize("strategy", ["fcfs(lost_last=true)+late+headroom+continuous", "kairos", "tuned", "paper"])
def test_every_waiting_request_is_answered_once_lost_ones_too(strategy: str) -> None:
    fleet = prefill("prefill-0", chunk_tokens=512, free_in_s=0.2), prefill("prefill-1", chunk_tokens=512)
    waiting = [waits(n, 200 + 37 * n, -0.3 * n) for n in range(60)]

    answer = answered(snapshot(*fleet, strategy=strategy, waiting=waiting))

    assert sorted(e["request_id"] for e in answer["prefill"]) == list(range(60))
    assert any(not e["on_time"] for e in answer["prefill"])
    for instance in ("prefill-0", "prefill-1"):
        places = [e["order"] for e in answer["prefill"] if e["instance_id"] == instance]
        assert sorted(places) == list(range(len(places)))


def test_a_request_that_is_lost_when_its_turn_comes_steps_back_under_lost_last() -> None:
    # after the 9 s of `a`, `b` (due at 10) cannot be done in time any more; `c` can
    waiting = [waits("a", 9_000), waits("b", 2_000, 0.0), waits("c", 500, 0.0, ttft_target_s=12.0)]
    body = snapshot(prefill(), strategy="fcfs(lost_last=true)+late+least-requests+continuous", waiting=waiting)

    answer = answered(body)

    assert order_on(answer) == ["a", "c", "b"]
    assert [entry(answer, r)["on_time"] for r in "abc"] == [True, False, True]


def test_a_class_without_targets_has_no_deadline_and_is_always_on_time() -> None:
    answer = answered(snapshot(prefill(), waiting=[waits("a", slo_class="batch")]))

    assert entry(answer, "a")["ttft_deadline_s"] is None
    assert entry(answer, "a")["on_time"]
    assert entry(answer, "a")["reason"]["laxity_s"] is None


def test_the_share_guard_saves_up_from_ended_steps_and_gives_the_floor_to_the_oldest_lost_one() -> None:
    body = snapshot(prefill(), strategy="fcfs(lost_last=true)+late+least-requests+continuous")
    lost, fresh = waits("lost", 1_000, -100.0), waits("fresh", 1_000, -1.0)
    first = answered(body | {"waiting": [lost, fresh]})
    steps = [{"instance_id": "prefill-0", "seconds": 30.0, "new_tokens": 30_000}]

    # 5 % of 30 s cover the 1 s that the lost one needs
    second = answered(body | {"waiting": [lost, waits("next")], "ended_steps": steps, "state": first["state"]})

    assert order_on(first)[0] == "fresh"
    assert entry(second, "lost")["reason"]["chosen_by"] == "share_guard"


def test_what_a_policy_learned_from_ended_steps_is_in_the_state() -> None:
    body = snapshot(prefill(chunk_tokens=1_000), strategy="paper")
    steps = [{"instance_id": "prefill-0", "seconds": 2.0, "new_tokens": 1_000}]

    without = answered(body)
    learned = answered(body | {"ended_steps": steps})

    assert learned["state"] != without["state"]
    assert answered(body | {"state": learned["state"]})["state"] == learned["state"]


# -- admission and models


def test_a_request_whose_model_nobody_serves_is_rejected() -> None:
    body = snapshot(prefill(serves=["x"]), decode(serves=["x"]), waiting=[waits("a", model="y"), waits("b", model="x")])

    answer = answered(body)

    assert answer["rejected"] == [
        {"request_id": "a", "status": 404, "reason": "no_instance_serves_model", "retry_after_s": None}
    ]
    assert [e["request_id"] for e in answer["prefill"]] == ["b"]


def test_a_model_that_no_decode_instance_serves_is_rejected_too() -> None:
    body = snapshot(prefill(serves=["x"]), decode(serves=["y"]), waiting=[waits("a", model="x")])

    assert [r["reason"] for r in answered(body)["rejected"]] == ["no_instance_serves_model"]


def test_without_serves_an_instance_answers_to_its_profiles_model() -> None:
    answer = answered(snapshot(prefill(), waiting=[waits("a", model="org/model-8b")]))

    assert answer["rejected"] == []


def test_requests_go_only_to_instances_that_serve_their_model() -> None:
    fleet = prefill("prefill-0", serves=["x"]), prefill("prefill-1", serves=["y"])
    waiting = [waits("a", model="y"), waits("b", model="y"), waits("c", model="x")]

    answer = answered(snapshot(*fleet, waiting=waiting))

    assert order_on(answer, "prefill-1") == ["a", "b"]
    assert order_on(answer, "prefill-0") == ["c"]


def test_admission_refuses_what_would_be_late_behind_the_queue_and_says_when_to_come_back() -> None:
    # behind a (6 s), b would be done at 12 > 10 and c, which is short, at 7
    waiting = [waits("a", 6_000, -0.2), waits("b", 6_000, -0.1), waits("c", 1_000)]
    body = snapshot(prefill(), strategy="fcfs+late+least-requests+continuous+on-arrival", waiting=waiting)

    answer = answered(body)

    assert answer["rejected"] == [{"request_id": "b", "status": 503, "reason": "lost_on_arrival", "retry_after_s": 3}]
    assert order_on(answer) == ["a", "c"]


def test_admission_is_not_asked_again_about_a_request_that_was_taken() -> None:
    waiting = [waits("a", 6_000, -0.2), waits("b", 6_000, -0.1, admitted=True)]
    body = snapshot(prefill(), strategy="fcfs+late+least-requests+continuous+on-arrival", waiting=waiting)

    assert answered(body)["rejected"] == []


# -- decode


def test_a_decode_instance_admits_what_is_ready_and_says_how_long_its_step_takes() -> None:
    body = snapshot(
        decode(),
        strategy=FCFS,
        resident=[{"request_id": "r", "instance_id": "decode-0", "context_tokens": 100, "first_token_s": -1.0}],
        transferred=[{"request_id": "t", "context_tokens": 50, "first_token_s": 0.0}],
    )

    (step,) = answered(body)["decode"]

    assert (step["admit"], step["step"]) == (["t"], ["r", "t"])
    assert step["predicted_step_s"] == pytest.approx(0.012)
    assert step["reason"] == {
        "code": "policy",
        "resident_requests": 1,
        "ready_requests": 1,
        "sum_context_tokens": 100,
        "tightest_tpot_s": 0.05,
    }


def test_transferred_requests_are_placed_in_ready_order() -> None:
    def transferred(request_id: str, ready_s: float) -> dict[str, Any]:
        return {"request_id": request_id, "context_tokens": 50, "first_token_s": -1.0, "ready_s": ready_s}

    body = snapshot(decode("decode-0"), decode("decode-1"), strategy=FCFS)

    answer = answered(body | {"transferred": [transferred("b", -0.1), transferred("a", -0.2)]})

    assert answer["placements"] == [
        {"request_id": "a", "instance_id": "decode-0"},
        {"request_id": "b", "instance_id": "decode-1"},
    ]


@pytest.mark.parametrize(("place_decode", "placed"), [("at_ready", []), ("at_first_token", ["t"])])
def test_a_request_in_transfer_is_placed_when_the_handover_says_so(place_decode: str, placed: list[str]) -> None:
    settings = settings_of(
        fleet={
            "prefill": [{"profile": "even"}],
            "decode": [{"profile": "even"}],
            "handover": {"place_decode": place_decode},
        }
    )
    coming = [{"request_id": "t", "context_tokens": 50, "first_token_s": 0.0, "ready_s": 0.5}]

    answer = answered(snapshot(decode(), transferred=coming), settings)

    assert [p["request_id"] for p in answer["placements"]] == placed
    assert answer["decode"][0]["admit"] == []


def test_at_dispatch_both_legs_are_chosen_together() -> None:
    settings = settings_of(
        fleet={
            "prefill": [{"profile": "even"}],
            "decode": [{"profile": "even"}],
            "handover": {"place_decode": "at_dispatch"},
        }
    )
    waiting = [waits("a"), waits("b")]
    body = snapshot(prefill("prefill-0"), prefill("prefill-1"), decode("decode-0"), decode("decode-1"), waiting=waiting)

    answer = answered(body | {"strategy": FCFS}, settings)

    assert answer["placements"] == [
        {"request_id": "a", "instance_id": "decode-0"},
        {"request_id": "b", "instance_id": "decode-1"},
    ]


def test_when_the_next_tokens_do_not_fit_the_last_admitted_is_swapped_out() -> None:
    residents = [
        {"request_id": r, "instance_id": "decode-0", "context_tokens": 100, "first_token_s": 0.0} for r in "ab"
    ]

    (step,) = answered(snapshot(decode(kv_tokens=201), strategy=FCFS, resident=residents))["decode"]

    assert (step["swap_out"], step["step"]) == (["b"], ["a"])


def test_an_idle_decode_instance_does_nothing() -> None:
    (step,) = answered(snapshot(decode()))["decode"]

    assert (step["step"], step["predicted_step_s"], step["reason"]["code"]) == ([], None, "idle")


# -- what a caller is told


def test_what_control_does_not_apply_is_said() -> None:
    fleet = prefill(control="gateway"), decode(control="gateway")
    transferred = [{"request_id": "t", "context_tokens": 50, "first_token_s": 0.0}]

    answer = answered(snapshot(*fleet, strategy="kairos", transferred=transferred))

    assert answer["warnings"] == [
        "kairos: preemption at chunk ends is not applied (control: gateway)",
        "kairos: the choice of prompts that share a step is not applied (control: gateway)",
        "kairos: decode policy envelope is not applied (control: gateway); "
        "the engine's continuous batching runs instead",
    ]
    assert answer["decode"][0]["reason"]["code"] == "not_controlled"


def test_an_unknown_profile_is_answered_with_the_closest_and_said_so() -> None:
    fast = {"gpu": "B300", "model": "org/model-8b", "engine": "vllm"} | {"step_times": PROFILES["even"]["step_times"]}
    settings = settings_of(profiles=PROFILES | {"fast": fast})

    answer = answered(snapshot(prefill(profile="b300-sxm6_org-model-8b_bf16_1_1_vllm")), settings)

    assert answer["warnings"] == [
        "profile 'b300-sxm6_org-model-8b_bf16_1_1_vllm' is not configured: step times of the closest, 'fast'"
    ]
    assert answer["model_versions"] == {"b300-sxm6_org-model-8b_bf16_1_1_vllm": "linear"}


def test_a_profile_is_known_by_its_id_too() -> None:
    assert answered(snapshot(prefill(profile="h100_org-model-8b__1_1_vllm")))["warnings"] == []


def test_a_profile_without_step_times_is_answered_from_a_prior_and_said_so() -> None:
    settings = settings_of(profiles={"even": {"gpu": "H100", "model": "org/model-8b"}})

    answer = answered(snapshot(prefill(), waiting=[waits("a")]), settings)

    assert answer["model_versions"] == {"even": "prior"}
    assert answer["warnings"] == ["profile 'even' has no step times: bandwidth, FLOPs and model size"]
    assert entry(answer, "a")["predicted_prefill_s"] > 0


def test_a_request_longer_than_any_kv_capacity_is_said() -> None:
    answer = answered(snapshot(prefill(), decode(kv_tokens=500), waiting=[waits("a", 1_000)]))

    assert answer["warnings"] == [
        "1 requests are longer than any decode instance's KV capacity of 500 tokens; "
        "each would run alone on an empty instance"
    ]


def test_a_state_of_another_strategy_is_not_used_and_said_so() -> None:
    state = answered(snapshot(prefill(), strategy="paper"))["state"]

    answer = answered(snapshot(prefill(), strategy="kairos", state=state))

    assert answer["warnings"] == ["state is of another strategy and was not used"]


def test_the_same_snapshot_gives_the_same_answer() -> None:
    fleet = prefill("prefill-0", chunk_tokens=512), prefill("prefill-1", chunk_tokens=512), decode()
    body = snapshot(*fleet, waiting=[waits(n, 100 + 37 * n, -0.1 * n) for n in range(50)])

    assert answered(body) == answered(body)


def test_another_snapshot_has_another_decision_id() -> None:
    body = snapshot(prefill())

    assert answered(body)["decision_id"] != answered(body | {"now_s": 1.0})["decision_id"]


def test_a_third_partys_placement_may_leave_requests_unbound_too() -> None:
    slots = {"prefill": "fcfs", "prefill_placement": "service.recording:Undecided"}
    settings = settings_of(strategies={"own": slots | {"decode_placement": "headroom", "decode": "slack"}})
    fleet = prefill("prefill-0", free_in_s=5.0), prefill("prefill-1")

    answer = answered(snapshot(*fleet, strategy="own", waiting=[waits("a"), waits("b")]), settings)

    assert order_on(answer, "prefill-1") == ["a", "b"]


def test_with_many_instances_and_requests_every_request_is_still_answered_once() -> None:
    fleet = [prefill(f"prefill-{n}", chunk_tokens=2_048, free_in_s=0.1 * n) for n in range(60)]
    waiting = [waits(n, 50 + (7 * n) % 3_000, -0.001 * n) for n in range(9_000)]

    answer = answered(snapshot(*fleet, waiting=waiting))

    assert sorted(e["request_id"] for e in answer["prefill"]) == list(range(9_000))


def test_a_policys_memory_that_cannot_be_kept_is_forgotten_and_said_so() -> None:
    slots = {"prefill": "service.recording:Hoarder", "prefill_placement": "late"}
    settings = settings_of(strategies={"own": slots | {"decode_placement": "headroom", "decode": "slack"}})

    answer = answered(snapshot(prefill(), strategy="own", waiting=[waits("a")]), settings)

    assert order_on(answer) == ["a"]
    assert answer["warnings"] == ["policy failed, replaced 1 times: Hoarder: TypeError"]


def test_a_trained_model_answers_and_what_it_borrows_is_said(tmp_path: Path) -> None:
    measured = Profile("H100", "org/model-8b", engine="vllm")
    lines: dict[StepKind, Line] = {"prefill": Line(0.0, 1e-3, 0.0), "decode": Line(0.01, 1e-3, 0.0)}
    models = {kind: model_of_line(kind, line, "measured") for kind, line in lines.items()}
    save([ProfileModels(measured, models, {})], tmp_path / "model.kairos")
    profile = {"model": "org/model-8b", "engine": "vllm", "step_times": {"model": str(tmp_path / "model.kairos")}}
    settings = settings_of(profiles={"even": profile | {"gpu": "H100"}, "other": profile | {"gpu": "B300"}})
    fleet = prefill("prefill-0"), prefill("prefill-1", profile="other")

    answer = answered(snapshot(*fleet, waiting=[waits("a", instance_id="prefill-0")]), settings)

    assert entry(answer, "a")["predicted_prefill_s"] == pytest.approx(1.0, rel=0.02)
    assert answer["model_versions"] == {"even": "model.kairos", "other": "model.kairos"}
    assert any("'other' is not (wholly) in its model" in warning for warning in answer["warnings"])
