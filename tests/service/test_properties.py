"""What holds for every snapshot that makes sense, under every shipped policy."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service.snapshots import answered, decode, prefill, scheduler_of, settings_of, snapshot, waits

from kairos.scheduler_core.plugins import installed

SCHEDULER = scheduler_of(settings_of(guards={"deferred_share": 0.2}))
STRATEGIES = [
    *(
        f"{name}{options}+late+headroom+envelope"
        for name in installed("prefill")
        for options in ("", "(lost_last=true)")
    ),
    *(f"edf(preempt=true)+{name}+headroom+slack" for name in installed("prefill_placement")),
    *(f"on-time+late+{name}+capped" for name in installed("decode_placement")),
    *(f"fcfs+late+least-requests+{name}" for name in installed("decode")),
    *(
        f"on-time+{place}+headroom+envelope+{name}"
        for name in installed("admission")
        for place in ("late", "least-work")
    ),
]


@st.composite
def snapshots(draw: st.DrawFn) -> dict[str, Any]:
    number = st.integers
    seconds = st.floats(-20, 20)
    target = st.none() | st.floats(0.001, 30)
    sections = {
        "chunk_tokens": st.none() | number(16, 2_000),
        "max_requests_per_step": number(1, 4),
        "free_in_s": st.none() | st.floats(0, 5),
        "control": st.sampled_from(["engine", "gateway", "gateway+priority"]),
        "serves": st.sampled_from([[], ["org/model-8b"], ["org/model-8b", "lora"], ["lora"]]),
    }
    prefills = [prefill(f"p{n}", **draw(st.fixed_dictionaries(sections))) for n in range(draw(number(0, 3)))]
    sections = {
        "max_batch": number(1, 6),
        "kv_tokens": st.none() | number(1, 9_000),
        "batch_limit": st.none() | number(1, 6),
        "free_in_s": st.none() | st.floats(0, 1),
        "control": st.sampled_from(["engine", "gateway"]),
    }
    decodes = [decode(f"d{n}", **draw(st.fixed_dictionaries(sections))) for n in range(draw(number(0, 3)))]
    ids = iter(range(1_000))
    common = {"slo_class": st.sampled_from(["default", "batch"]), "tenant": st.sampled_from(["", "t"])}

    def some(most: int, fields: dict[str, st.SearchStrategy[Any]]) -> list[dict[str, Any]]:
        return [
            {"request_id": next(ids)} | draw(st.fixed_dictionaries(fields | common))
            for _ in range(draw(number(0, most)))
        ]

    prompt = {
        "arrival_s": seconds,
        "prompt_tokens": number(40, 6_000),
        "cached_tokens": number(0, 39),
        "ttft_target_s": target,
    }
    waiting = some(12, prompt | {"model": st.sampled_from(["", "org/model-8b", "lora", "other"])})
    for request in waiting:
        home = draw(st.sampled_from(["", *(p["instance_id"] for p in prefills)]))
        if home:
            request["instance_id"] = home
            request["prefilled_tokens"] = draw(number(0, request["prompt_tokens"] - request["cached_tokens"] - 1))
    token = {
        "context_tokens": number(1, 5_000),
        "first_token_s": seconds,
        "tpot_target_s": target,
        "output_tokens": number(1, 99),
    }
    at_prefill = {"instance_id": st.sampled_from([p["instance_id"] for p in prefills])} if prefills else {}
    at_decode = {"instance_id": st.sampled_from([d["instance_id"] for d in decodes])} if decodes else {}
    return snapshot(
        *prefills,
        *decodes,
        waiting=waiting,
        running=some(3, prompt | at_prefill) if prefills else [],
        resident=some(8, token | at_decode) if decodes else [],
        transferred=some(6, token | {"ready_s": st.none() | st.floats(-1, 1)}),
        strategy=draw(st.sampled_from(STRATEGIES)),
    )


@settings(max_examples=300, derandomize=True, deadline=None)
@given(snapshots())
def test_every_request_is_answered_once_and_nothing_is_done_twice(body: dict[str, Any]) -> None:
    answer = answered(body, scheduler=SCHEDULER)

    rejected = [r["request_id"] for r in answer["rejected"]]
    planned = [e["request_id"] for e in answer["prefill"]]
    told = {name: [r["request_id"] for r in body[name]] for name in ("waiting", "transferred", "resident")}
    assert sorted(planned + [r for r in rejected if r in told["waiting"]]) == told["waiting"]
    for entry in answer["prefill"]:
        assert entry["predicted_prefill_s"] > 0
        assert entry["predicted_ttft_s"] >= entry["reason"]["waited_s"]
    admitted = [r for step in answer["decode"] for r in step["admit"]]
    stepping = [r for step in answer["decode"] for r in step["step"]]
    assert len(set(admitted)) == len(admitted)
    assert len(set(stepping)) == len(stepping)
    assert set(stepping) <= set(told["transferred"]) | set(told["resident"])
    assert not any("policy failed" in warning for warning in answer["warnings"])


@settings(max_examples=50, derandomize=True, deadline=None)
@given(snapshots())
def test_an_answer_depends_on_snapshot_and_state_alone(body: dict[str, Any]) -> None:
    first = answered(body, scheduler=SCHEDULER)
    again = answered(body, scheduler=SCHEDULER)
    with_state = [answered(body | {"state": first["state"]}, scheduler=SCHEDULER) for _ in range(2)]

    assert first == again
    assert with_state[0] == with_state[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_thousand_requests_are_answered_under_every_policy(strategy: str) -> None:
    fleet = [prefill(f"prefill-{n}", chunk_tokens=2_048) for n in range(2)] + [decode()]
    waiting = [waits(n, 50 + (7 * n) % 3_000, -0.001 * n) for n in range(10_000)]

    answer = answered(snapshot(*fleet, strategy=strategy, waiting=waiting), scheduler=SCHEDULER)

    assert len(answer["prefill"]) + len(answer["rejected"]) == 10_000
