"""The Decider around a policy: options, control, guards and memory. Requests take 1 s unless told otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec
import pytest
from builders import decode_instance, decode_view_of, prefill_instance, resident, waiting

from kairos.scheduler_core import plugins
from kairos.scheduler_core.decider import Decider, PrefillLane
from kairos.scheduler_core.decision import PrefillDecision, Reason
from kairos.scheduler_core.domain import Control, RequestId, Waiting
from kairos.scheduler_core.guards import ValidityGuard
from kairos.scheduler_core.policy import (
    Admission,
    AdmissionView,
    DecodeLoad,
    DecodePlacementView,
    DecodePlan,
    DecodeStep,
    DecodeView,
    Peer,
    PrefillLoad,
    PrefillPlacementView,
    PrefillPlan,
    PrefillView,
)
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.strategy import parse_strategy


def decider(
    prefill: str = "fcfs",
    decode: str = "continuous",
    placement: str = "late",
    decode_placement: str = "headroom",
    admission: str = "accept-all",
    share: float = 0.0,
    budget_s: float | None = None,
) -> Decider:
    text = f"{prefill}+{placement}+{decode_placement}+{decode}+{admission}"
    return Decider(parse_strategy(text), share, budget_s)


def lane_of(
    decider: Decider,
    requests: Sequence[Waiting] = (),
    chunk_tokens: int | None = None,
    most: int = 1,
    control: Control = Control.ENGINE,
    shared: WaitingQueue | None = None,
) -> PrefillLane:
    instance = prefill_instance(chunk_tokens=chunk_tokens, max_requests_per_step=most, control=control)
    lane = decider.prefill_lane(instance, decider.prefill_rule(), shared)
    for request in requests:
        lane.own.add(request, 0.0)
    return lane


def run_step(decider: Decider, lane: PrefillLane, now_s: float) -> PrefillDecision:
    """Decides and runs a step to its end, as an engine would."""
    decision = decider.next_prefill(lane, now_s)
    assert decision is not None
    decider.prefill_started(lane, decision)
    done = []
    for request, part in zip(decision.requests, decision.parts, strict=True):
        left = request.remaining_tokens - part.new_tokens
        end_s = now_s + part.new_tokens / 1_000
        if left:
            lane.own.replace(
                waiting(
                    request.request_id,
                    left / 1_000,
                    arrival_s=request.arrival_s,
                    ttft_target_s=request.ttft_target_s,
                    prefilled_tokens=request.prefilled_tokens + part.new_tokens,
                ),
                end_s,
            )
        else:
            lane.own.remove(request.request_id)
            done.append(request.request_id)
    new_tokens = sum(part.new_tokens for part in decision.parts)
    decider.prefill_ended(lane, new_tokens / 1_000, new_tokens, done)
    return decision


def ids_of_all_steps(decider: Decider, lane: PrefillLane) -> list[RequestId]:
    now_s, ran = 0.0, []
    while lane.waits():
        decision = run_step(decider, lane, now_s)
        now_s += sum(part.new_tokens for part in decision.parts) / 1_000
        ran.extend(decision.request_ids)
    return ran


# -- the two options ---------------------------------------------------------------------------------------------------


def test_lost_last_puts_the_lost_behind_all_others_oldest_first() -> None:
    requests = [
        waiting("lost-new", arrival_s=0.2, ttft_target_s=0.5),
        waiting("lost-old", ttft_target_s=0.5),
        waiting("in-time", arrival_s=0.3),
    ]
    plain, option = decider("fcfs"), decider("fcfs(lost_last=true)")

    assert ids_of_all_steps(plain, lane_of(plain, requests)) == ["lost-old", "lost-new", "in-time"]
    assert ids_of_all_steps(option, lane_of(option, requests)) == ["in-time", "lost-old", "lost-new"]


def test_lost_last_says_so_when_only_lost_ones_are_left() -> None:
    option = decider("edf(lost_last=true)")
    lane = lane_of(option, [waiting(0, ttft_target_s=0.5)])

    assert run_step(option, lane, 0.0).reason is Reason.LOST_LAST


def test_preempt_decides_again_at_every_chunk_end() -> None:
    # a long one of three chunks begins; a short one comes while the first chunk runs
    def order(rule: str) -> list[RequestId]:
        chosen = decider(rule)
        lane = lane_of(chosen, [waiting("long", 3.0)], chunk_tokens=1_000)
        first = run_step(chosen, lane, 0.0)
        lane.own.add(waiting("short", 0.5, arrival_s=0.1), 1.0)
        return [*first.request_ids, *ids_of_all_steps(chosen, lane)]

    assert order("sjf") == ["long", "long", "long", "short"]
    assert order("sjf(preempt=true)") == ["long", "short", "long", "long"]
    assert order("on-time") == ["long", "long", "long", "short"]  # both are in time: by deadline


def test_an_unfinished_prompt_goes_on_without_asking_the_policy() -> None:
    chosen = decider("sjf")
    lane = lane_of(chosen, [waiting("long", 3.0)], chunk_tokens=1_000)
    run_step(chosen, lane, 0.0)

    assert run_step(chosen, lane, 1.0).reason is Reason.CONTINUES


def test_a_packing_rule_ignores_both_options() -> None:
    rule = decider("on-time(lost_last=true,preempt=false)").prefill_rule()

    assert (rule.packs, rule.lost_last, rule.preempt) == (True, False, True)


# -- what control leaves to Kairos -------------------------------------------------------------------------------------


def test_behind_a_gateway_nothing_is_preempted() -> None:
    chosen = decider("sjf(preempt=true)")
    lane = lane_of(chosen, [waiting("long", 3.0)], chunk_tokens=1_000, control=Control.GATEWAY)
    run_step(chosen, lane, 0.0)
    lane.own.add(waiting("short", 0.5), 1.0)

    assert run_step(chosen, lane, 1.0).request_ids == ["long"]


def test_behind_a_gateway_no_step_is_shared() -> None:
    requests = [waiting(n, 0.3) for n in range(3)]

    def together(control: Control) -> list[RequestId]:
        chosen = decider("kairos-paper")
        return run_step(chosen, lane_of(chosen, requests, 1_000, most=8, control=control), 0.0).request_ids

    assert together(Control.ENGINE) == [0, 1, 2]
    assert together(Control.GATEWAY) == [0]


@pytest.mark.parametrize("control", [Control.GATEWAY, Control.GATEWAY_PRIORITY])
def test_behind_a_gateway_decode_is_the_engines_continuous_batching(control: Control) -> None:
    residents = [resident(n, tpot_target_s=0.012) for n in range(5)]  # 15 ms for all: slack would let two take part
    instance = decode_instance(control=control)
    chosen = decider(decode="slack")

    decision = chosen.next_decode(chosen.decode_policy(instance), decode_view_of(0.0, residents, instance=instance))

    assert decision.plan.step is None


# -- the step ----------------------------------------------------------------------------------------------------------


def test_a_step_takes_whole_remainders_until_its_tokens_are_used_and_splits_the_last() -> None:
    chosen = decider("kairos-paper")
    requests = [waiting(0, 0.5, prefilled_tokens=200), waiting(1, 0.4), waiting(2, 0.9, cached_tokens=50)]

    decision = run_step(chosen, lane_of(chosen, requests, chunk_tokens=1_000, most=8), 0.0)

    parts = dict(zip(decision.request_ids, decision.parts, strict=True))
    assert parts == {1: (400, 0), 0: (500, 200), 2: (100, 50)}


def test_an_instance_chooses_from_its_own_and_the_shared_queue_as_one() -> None:
    chosen = decider("sjf")
    shared = WaitingQueue([waiting("shared-short", 0.5), waiting("shared-long", 5.0)])
    lane = lane_of(chosen, [waiting("own", 1.0)], shared=shared)

    ordered = [w.request_id for w in chosen.prefill_order(lane, 0.0)]

    assert ordered == ["shared-short", "own", "shared-long"]


def started_by_an_engine(prefill: str, wanted: int, unfinished: bool = False) -> list[RequestId]:
    """Whom an engine may start that fills steps of 500 tokens itself, of prompts with 300, 200 and 100 tokens."""
    decides = decider(prefill)
    lane = lane_of(decides, [waiting("long", 0.3), waiting("middle", 0.2), waiting("short", 0.1)], 500, most=8)
    if unfinished:
        lane.current = "middle"
    decision = decides.next_prefill(lane, 0.0, wanted=wanted)
    assert decision is not None
    return decision.request_ids


def test_an_engine_that_fills_its_steps_starts_as_many_of_an_order_as_it_wants_and_the_budget_takes() -> None:
    assert started_by_an_engine("sjf(preempt=true)", 1) == ["short"]
    assert started_by_an_engine("sjf(preempt=true)", 2) == ["short", "middle"]
    assert started_by_an_engine("fcfs(preempt=true)", 8) == ["long", "middle"]


def test_an_unfinished_prompt_stands_before_what_else_the_engine_may_start() -> None:
    assert started_by_an_engine("sjf", 3, unfinished=True) == ["middle", "short", "long"]


def test_a_packing_rule_says_itself_who_shares_the_step_of_an_engine() -> None:
    assert started_by_an_engine("on-time", 8) == started_by_an_engine("on-time", 1)


def test_nothing_to_run_is_no_decision() -> None:
    chosen = decider("on-time")

    assert chosen.next_prefill(lane_of(chosen), 0.0, [Peer("other", 1.0)]) is None


def test_the_whole_order_begins_with_what_runs_next_and_leaves_the_share_guard_as_it_was() -> None:
    chosen = decider("sjf", share=0.5)
    lane = lane_of(chosen, [waiting("long", 3.0), waiting("short", 1.0), waiting("shorter", 0.5)])

    ordered = [w.request_id for w in chosen.prefill_order(lane, 0.0)]

    assert ordered == ["shorter", "short", "long"]
    assert [run_step(chosen, lane, 0.0).request_ids[0], lane.guard.pinned] == ["shorter", None]


def test_asking_for_the_order_spends_nothing_of_the_share() -> None:
    chosen = decider("sjf", share=0.5)
    lane = lane_of(chosen, [waiting("long", 2.0), *(waiting(f"short-{n}", arrival_s=0.1) for n in range(9))])
    for now_s in range(5):
        run_step(chosen, lane, float(now_s))

    asked = [chosen.prefill_order(lane, 5.0)[0].request_id for _ in range(2)]

    assert asked == ["long", "long"]  # the share covers its 2 s by now
    assert (lane.guard.bucket_s, lane.guard.pinned) == (2.0, None)


# -- the share guard, from the outside ---------------------------------------------------------------------------------


def test_a_request_that_was_passed_over_runs_once_its_share_covers_it() -> None:
    # short-0 passes it over; then half of the time is owed to it: after 4 s more of others its 2 s are covered
    chosen = decider("sjf", share=0.5)
    lane = lane_of(chosen, [waiting("long", 2.0), *(waiting(f"short-{n}", arrival_s=0.1) for n in range(9))])

    ran = [run_step(chosen, lane, float(now_s)) for now_s in range(6)]

    assert [decision.request_ids[0] for decision in ran] == [*(f"short-{n}" for n in range(5)), "long"]
    assert ran[-1].reason is Reason.SHARE_GUARD


def test_what_the_share_started_runs_to_its_end_even_under_preemption() -> None:
    chosen = decider("sjf(preempt=true)", share=0.5)
    lane = lane_of(chosen, [waiting("long", 2.0), *(waiting(f"short-{n}", arrival_s=0.1) for n in range(9))], 1_000)

    ran = [run_step(chosen, lane, float(now_s)).request_ids[0] for now_s in range(8)]

    assert ran[5:] == ["long", "long", "short-5"]


# -- the validity guard, from the outside ------------------------------------------------------------------------------


class Broken:
    """A prefill policy that does what it is told to do wrong."""

    answer: ClassVar[Callable[[PrefillView], Any]]

    def order(self, view: PrefillView) -> Any:
        return type(self).answer(view)


class BrokenPacking:
    answer: ClassVar[Callable[[PrefillView], Any]]

    def plan(self, view: PrefillView) -> Any:
        return type(self).answer(view)


class BrokenDecode:
    answer: ClassVar[Callable[[DecodeView], Any]]

    def step(self, view: DecodeView) -> Any:
        return type(self).answer(view)


class BrokenPlacement:
    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        return "prefill-99"

    def place_decode(self, view: DecodePlacementView) -> str:
        raise KeyError("decode-99")


class BrokenAdmission:
    needs_prediction = False

    def admit(self, view: AdmissionView) -> Admission:
        raise ZeroDivisionError


def raising(view: object) -> object:
    raise RuntimeError("no idea")


@contextmanager
def answering(policy: Any, answer: Callable[[Any], Any]) -> Iterator[str]:
    """The policy's name, as `module:Class`, while it answers so."""
    policy.answer = staticmethod(answer)
    yield f"{__name__}:{policy.__name__}"
    del policy.answer


@pytest.mark.parametrize(
    "answer",
    [
        raising,
        lambda view: ["nobody"],
        lambda view: [float("nan")],
        lambda view: [],
        lambda view: None,
        lambda view: [None],
        lambda view: (w.request_id for w in view.waiting),
        lambda view: [[w.request_id] for w in view.waiting],
        lambda view: 7,
    ],
    ids=["raises", "stranger", "nan", "empty", "none", "holds none", "generator", "unhashable", "number"],
)
def test_an_order_that_cannot_be_used_is_replaced_by_arrival_order_for_that_decision(
    answer: Callable[[PrefillView], Any],
) -> None:
    with answering(Broken, answer) as name:
        chosen = decider(name)
        lane = lane_of(chosen, [waiting("new", 0.1, arrival_s=1.0), waiting("old", 5.0)])

        decision = chosen.next_prefill(lane, 1.0)

    assert decision is not None
    assert (decision.request_ids, decision.reason) == (["old"], Reason.FALLBACK)
    assert sum(chosen.validity.fallbacks.values()) == 1


@pytest.mark.parametrize(
    "answer",
    [
        raising,
        lambda view: PrefillPlan(["b", "b"], together=2),
        lambda view: PrefillPlan(["b", "a"], together=0),
        lambda view: PrefillPlan(["b", "a"], together=float("nan")),  # type: ignore[arg-type]  # the point
        lambda view: ["b", "a"],
    ],
    ids=["raises", "twice", "packs nobody", "packs nan", "no plan"],
)
def test_a_plan_that_cannot_be_used_is_replaced_by_arrival_order(answer: Callable[[PrefillView], Any]) -> None:
    with answering(BrokenPacking, answer) as name:
        chosen = decider(name)
        decision = chosen.next_prefill(lane_of(chosen, [waiting("a"), waiting("b")], chunk_tokens=2_000, most=2), 0.0)

    assert decision is not None
    assert (decision.request_ids, decision.reason) == (["a"], Reason.FALLBACK)


@pytest.mark.parametrize(
    "answer",
    [
        raising,
        lambda view: DecodePlan(admit=["nobody"]),
        lambda view: DecodePlan(),
        lambda view: DecodePlan(admit=["a"], step=[float("nan")]),  # type: ignore[list-item]  # the point
        lambda view: DecodePlan(admit=["a", "b", "c"]),
        lambda view: None,
    ],
    ids=["raises", "stranger", "admits nobody", "nan", "past the room", "none"],
)
def test_a_decode_plan_that_cannot_be_used_is_replaced_by_everyone_who_fits(
    answer: Callable[[DecodeView], Any],
) -> None:
    with answering(BrokenDecode, answer) as name:
        chosen = decider(decode=name)
        instance = decode_instance(kv_tokens=2_500)
        view = decode_view_of(0.0, [], [resident("a"), resident("b"), resident("c")], instance)

        decision = chosen.next_decode(chosen.decode_policy(instance), view)

    assert (decision.plan, decision.reason) == (DecodePlan(["a", "b"]), Reason.FALLBACK)
    assert sum(chosen.validity.fallbacks.values()) == 1


def test_a_placement_that_fails_is_replaced_by_the_least_loaded_instance() -> None:
    name = f"{__name__}:BrokenPlacement"
    chosen = decider(placement=name, decode_placement=name)
    prefill = [PrefillLoad(prefill_instance(f"prefill-{n}"), 1, tokens, 1.0, 1.0) for n, tokens in enumerate((9, 3))]
    decode = [DecodeLoad(decode_instance(f"decode-{n}"), size, 100, 0, 0) for n, size in enumerate((4, 2))]

    assert chosen.place_prefill(PrefillPlacementView(0.0, waiting(0), prefill)) == "prefill-1"
    assert chosen.place_decode(DecodePlacementView(0.0, resident(0), decode)) == "decode-1"
    assert chosen.validity.fallbacks == {"BrokenPlacement: ValueError": 1, "BrokenPlacement: KeyError": 1}


def test_an_admission_that_fails_takes_the_request() -> None:
    chosen = decider(admission=f"{__name__}:BrokenAdmission")

    assert chosen.admit(AdmissionView(0.0, waiting(0), 1.0, 0)) == Admission(accept=True)
    assert chosen.validity.fallbacks == {"BrokenAdmission: ZeroDivisionError": 1}


class Ticking:
    """A timer on which everything takes 2 ms."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.002
        return self.now_s


@pytest.mark.parametrize(("budget_s", "reason"), [(0.001, Reason.FALLBACK), (0.01, Reason.POLICY)])
def test_a_decision_that_takes_longer_than_its_budget_is_replaced(budget_s: float, reason: Reason) -> None:
    chosen = decider("sjf")
    chosen.validity = ValidityGuard(budget_s, timer=Ticking())
    instance = decode_instance()

    prefill = chosen.next_prefill(lane_of(chosen, [waiting("old", 5.0), waiting("short", 1.0)]), 0.0)
    decode = chosen.next_decode(chosen.decode_policy(instance), decode_view_of(0.0, [], [resident(0)], instance))

    assert prefill is not None
    assert [prefill.reason, decode.reason] == [reason, reason]
    assert prefill.request_ids == (["old"] if reason is Reason.FALLBACK else ["short"])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_policy_comes_back_as_it_was() -> None:
    chosen = decider(decode="kairos-paper")
    learned, fresh = (chosen.decode_policy(decode_instance()) for _ in range(2))
    chosen.decode_ended(learned, DecodeStep(0.03, 2, 3_000, 2_000))

    chosen.load_state(fresh, chosen.dump_state(learned))

    assert chosen.dump_state(fresh) == chosen.dump_state(learned)
    assert b'"2:7":0.03' in chosen.dump_state(fresh)


def test_a_policy_without_memory_has_an_empty_state_and_takes_any() -> None:
    chosen = decider()
    policy = chosen.decode_policy(decode_instance())
    chosen.load_state(policy, b"")

    assert chosen.dump_state(policy) == b""


def test_a_state_of_another_policy_is_refused() -> None:
    chosen = decider(decode="kairos-paper")

    with pytest.raises(msgspec.DecodeError):
        chosen.load_state(chosen.decode_policy(decode_instance()), b"[1, 2]")


def test_lanes_of_their_own_learn_apart() -> None:
    chosen = decider("kairos-paper")
    one, other = lane_of(chosen, [waiting(0)]), lane_of(chosen, [waiting(0)])
    run_step(chosen, one, 0.0)

    assert [lane.rule.policy.state.tokens for lane in (one, other)] == [1_000, 0]


def test_the_kinds_of_policy_are_five() -> None:
    assert set(plugins.POLICY_KINDS) == {"prefill", "prefill_placement", "decode_placement", "decode", "admission"}
