"""What the next step of an engine shall hold."""

from types import SimpleNamespace

import pytest
from builders import step_times
from hypothesis import given
from hypothesis import strategies as st

from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.embedded.planner import Limits, Planner, Room, StepPlan, step_limit_s, tokens_within
from kairos.scheduler_core.domain import Line, Part, RequestId, Resident
from kairos.scheduler_core.strategy import parse_strategy

EDF = "edf(lost_last=true,preempt=true)+late+headroom+continuous"
NO_TARGET_S = float("inf")


class Bench:
    """A planner with requests, at 1,000 prompt tokens a second; a decode step takes 10 ms and 1 ms a participant."""

    def __init__(self, strategy: str = EDF, batch_requests: int = 8, longest_hold_s: float = 5.0) -> None:
        limits = Limits(step_tokens=512, least_prompt_tokens=16, batch_requests=batch_requests, kv_tokens=100_000)
        self.planner = Planner(
            parse_strategy(strategy),
            step_times(),
            limits,
            deferred_share=0.0,
            budget_s=5.0,
            longest_hold_s=longest_hold_s,
        )
        self.entries: dict[RequestId, Entry] = {}
        self.now_s = 0.0

    def arrives(
        self, name: str, prompt: int = 100, ttft_s: float = 10.0, tpot_s: float = NO_TARGET_S, remote: bool = False
    ) -> Entry:
        entry = Entry(name, SimpleNamespace(), self.now_s, prompt, (ttft_s, tpot_s), "default", remote)
        self.entries[name] = entry
        self.planner.mirror.arrive(entry, self.now_s)
        return entry

    def has_computed(self, name: str, tokens: int) -> None:
        entry = self.entries[name]
        self.planner.started([(entry, Part(tokens, 0))])
        self.planner.mirror.computed(entry, tokens, self.now_s)

    def decodes(self, name: str, output: int = 1, prompt: int = 100, tpot_s: float = NO_TARGET_S) -> Entry:
        entry = self.arrives(name, prompt, tpot_s=tpot_s)
        self.planner.mirror.prompt_done(entry)
        self.planner.mirror.emitted(entry, output, prompt + output, self.now_s)
        return entry

    def plan(self, slots: int = 4, kv_tokens: int = 50_000) -> StepPlan:
        decoding = len(self.planner.mirror.residents)
        found = self.planner.plan(self.entries, Room(slots, kv_tokens, decoding), self.now_s)
        assert found is not None
        return found


def held(plan: StepPlan) -> list[RequestId]:
    return [entry.request_id for entry in plan.held]


def test_waiting_prompts_enter_in_the_order_of_the_policy_as_far_as_the_budget_goes() -> None:
    bench = Bench()
    for name, ttft_s in (("slow", 30.0), ("urgent", 5.0), ("middle", 9.0)):
        bench.arrives(name, 300, ttft_s)

    plan = bench.plan()

    assert list(plan.enter) == ["urgent", "middle"]
    assert not plan.closed


def test_a_packing_policy_keeps_the_door_shut_behind_its_choice() -> None:
    bench = Bench("on-time+late+headroom+continuous")
    for name in "ab":
        bench.arrives(name, 400)

    plan = bench.plan()

    assert (list(plan.enter), plan.closed) == (["a"], True)


def test_after_a_step_in_which_the_chosen_could_not_start_the_door_is_open() -> None:
    bench = Bench("on-time+late+headroom+continuous")
    for name in "ab":
        bench.arrives(name, 400)
    bench.plan()

    bench.planner.filled({"someone else": 1}, tokens_left=True)

    assert not bench.plan().closed


def test_a_running_prompt_yields_to_a_more_urgent_one() -> None:
    bench = Bench()
    bench.arrives("long", 3000, 60.0)
    bench.has_computed("long", 512)
    bench.arrives("urgent", 600, 1.0)

    plan = bench.plan()

    assert list(plan.enter) == ["urgent"]
    assert held(plan) == ["long"]


@pytest.mark.parametrize(("slots", "kv_tokens"), [(0, 50_000), (4, 500)])
def test_it_does_not_yield_to_one_that_has_no_room_to_start(slots: int, kv_tokens: int) -> None:
    bench = Bench()
    bench.arrives("long", 3000, 60.0)
    bench.has_computed("long", 512)
    bench.arrives("urgent", 600, 1.0)

    assert held(bench.plan(slots, kv_tokens)) == []


def test_a_policy_without_preemption_lets_running_prompts_end() -> None:
    bench = Bench("edf+late+headroom+continuous")
    bench.arrives("long", 3000, 60.0)
    bench.has_computed("long", 512)
    bench.arrives("urgent", 600, 1.0)

    plan = bench.plan()

    assert held(plan) == []
    assert list(plan.enter) == ["urgent"]


def test_nobody_is_held_longer_than_may_be() -> None:
    bench = Bench(longest_hold_s=2.0)
    bench.arrives("long", 3000, 60.0)
    bench.has_computed("long", 512)
    seen = []
    for now_s in (0.0, 1.0, 1.9, 2.0):
        bench.now_s = now_s
        bench.arrives(f"urgent-{now_s}", 600, 1.0)
        seen.append(held(bench.plan()))

    assert seen == [["long"], ["long"], ["long"], []]


def test_after_two_empty_steps_the_engine_decides_alone() -> None:
    bench = Bench()
    bench.arrives("a")
    bench.planner.filled({}, tokens_left=True)
    bench.planner.filled({}, tokens_left=True)

    assert bench.planner.plan(bench.entries, Room(4, 50_000, 0), 0.0) is None


def test_prompts_computed_elsewhere_wait_for_the_decode_policy() -> None:
    bench = Bench("edf+late+headroom+capped")
    bench.decodes("here", tpot_s=0.012)  # one more: 12 ms, two more: 13 ms
    for name in ("first", "second"):
        bench.arrives(name, tpot_s=0.012, remote=True)

    plan = bench.plan()

    assert (list(plan.enter), plan.closed) == (["first"], True)


def test_a_prompt_computed_elsewhere_is_let_in_before_its_kv_is_given_up_there() -> None:
    bench = Bench("edf+late+headroom+capped", longest_hold_s=3.0)
    bench.decodes("here", tpot_s=0.011)
    bench.arrives("waits", tpot_s=0.011, remote=True)
    assert list(bench.plan().enter) == []

    bench.now_s = 3.0

    assert list(bench.plan().enter) == ["waits"]


def test_residents_that_the_policy_leaves_out_are_held() -> None:
    bench = Bench("edf+late+headroom+slack")
    for n in range(4):
        bench.decodes(f"r{n}", prompt=100 * (n + 1), tpot_s=0.012)

    assert sorted(map(str, held(bench.plan()))) == ["r2", "r3"]


def test_without_decodes_or_without_targets_a_step_may_be_full() -> None:
    alone, careless = Bench(), Bench()
    alone.arrives("a", 3000)
    careless.arrives("a", 3000)
    careless.decodes("d")

    assert alone.plan().tokens == careless.plan().tokens == 512


def test_prompts_get_what_the_slack_of_decodes_leaves() -> None:
    bench = Bench()
    bench.decodes("d", tpot_s=0.1)
    bench.arrives("a", 3000)

    plan = bench.plan()

    assert plan.tokens == 1 + 39  # half of 100 ms of slack, 11 ms of it for the decode


def test_prompts_get_a_little_however_late_decodes_are() -> None:
    bench = Bench()
    bench.decodes("d", tpot_s=0.01)
    bench.arrives("a", 3000)
    bench.now_s = 0.1

    assert bench.plan().tokens == 1 + 16


def test_a_decode_that_is_late_beyond_hope_slows_nobody() -> None:
    bench = Bench()
    bench.decodes("d", tpot_s=0.01)
    bench.arrives("a", 3000)
    bench.now_s = 1.0

    assert bench.plan().tokens == 512


def test_the_limit_of_a_step_is_half_of_the_least_slack_or_of_the_target_of_a_late_one() -> None:
    ahead = Resident("a", 100, 5, 0.0, due_s=3.0, tpot_target_s=0.1)
    late = Resident("b", 100, 5, 0.0, due_s=0.9, tpot_target_s=0.2)

    assert step_limit_s([ahead], 1.0) == pytest.approx(0.5 * 2.0)
    assert step_limit_s([ahead, late], 1.0) == pytest.approx(0.5 * 0.2)


@given(st.floats(1e-6, 1e-3), st.floats(0, 1e-7), st.floats(1e-6, 5.0), st.integers(0, 100_000))
def test_the_tokens_of_a_stretch_of_time_take_no_longer_and_more_of_them_would(
    b_s: float, c_s: float, seconds: float, context: int
) -> None:
    tokens = tokens_within(Line(0.01, b_s, c_s), seconds, context)

    def work_s(n: int) -> float:
        return b_s * n + c_s * n * (context + n / 2)

    assert work_s(tokens) <= seconds * (1 + 1e-6)
    assert work_s(tokens + 2) >= seconds * (1 - 1e-6)


def test_a_view_that_lost_a_request_holds_nothing_of_it() -> None:
    bench = Bench()
    entry = bench.decodes("d", output=7)
    mirror = bench.planner.mirror

    mirror.leave(entry)
    mirror.leave(entry)

    assert (mirror.sum_context_tokens, len(mirror.residents)) == (0, 0)


class Raises:
    def order(self, view: object) -> list[str]:
        raise RuntimeError("no idea")


def test_failures_count_on_and_are_logged_once_a_minute_when_the_view_is_made_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(f"{__name__}:Raises+late+headroom+continuous")
    for name in "abc":
        bench.planner.mirror = bench.planner.fresh(bench.planner.decider.strategy)
        bench.arrives(name)
        bench.plan()

    assert bench.planner.validity.fallbacks == {"Raises: RuntimeError": 3}
    assert len(caplog.records) == 1
