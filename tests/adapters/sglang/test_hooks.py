"""What Kairos does in SGLang's scheduler, on a fake of it; tests/engine has SGLang's own sources."""

import functools
import gc
import json
import weakref
from typing import Any

import pytest
from fake_sglang import Req, SchedulePolicy, Scheduler, batch

from kairos.adapters import sglang as plugin
from kairos.adapters.sglang import hooks

LINEAR = {"prefill": {"b_s": 1e-3}, "decode": {"a_s": 0.01, "b_s": 1e-3}}
EDF = "edf(lost_last=true,preempt=true)+late+headroom+capped"


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIROS_ENGINE_LINEAR", json.dumps(LINEAR))
    monkeypatch.setenv("KAIROS_ENGINE_STRATEGY", EDF)
    monkeypatch.setenv("KAIROS_ENGINE_DECISION_BUDGET_S", "5")
    monkeypatch.setattr(hooks, "installed_version", lambda name: "0.5.23")


@pytest.fixture
def scheduler_class(monkeypatch: pytest.MonkeyPatch) -> type[Scheduler]:
    """The fake with the hooks in place, as SGLang's registry wraps its own."""

    class Hooked(Scheduler):
        pass

    def after(cls: type, name: str, hook: Any) -> None:
        original = getattr(cls, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            changed = hook(result, *args, **kwargs)
            return result if changed is None else changed

        monkeypatch.setattr(cls, name, wrapper)

    def around(cls: type, name: str, hook: Any) -> None:
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, functools.wraps(original)(lambda *a, **k: hook(original, *a, **k)))

    after(Hooked, "init_schedule_policy", hooks.after_init_schedule_policy)
    after(Hooked, "process_batch_result", hooks.after_process_batch_result)
    around(Hooked, "_get_new_prebuilt_batch", hooks.around_prebuilt_batch)
    after(SchedulePolicy, "calc_priority", hooks.after_calc_priority)
    around(SchedulePolicy, "shortest_prefill_chunk_limit", hooks.around_chunk_limit)
    return Hooked


def sorted_by(scheduler: Scheduler, *reqs: Req) -> list[str]:
    waiting = list(reqs)
    scheduler.policy.calc_priority(waiting, None, processed_tokens=0)
    return [req.rid for req in waiting]


def test_waiting_prompts_are_sorted_as_the_policy_says(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()

    order = sorted_by(
        scheduler,
        Req("slow", 100, kairos_ttft_s=9.0),
        Req("urgent", 100, kairos_ttft_s=1.0),
        Req("middle", 100, kairos_ttft_s="4.0"),
    )

    assert order == ["urgent", "middle", "slow"]


def test_a_prefix_hit_counts_as_less_work(scheduler_class: type[Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIROS_ENGINE_STRATEGY", "sjf+late+headroom+continuous")
    scheduler = scheduler_class()
    cached, short = Req("cached", 3000), Req("short", 500)
    first = sorted_by(scheduler, cached, short)

    cached.num_matched_prefix_tokens = 2900

    assert (first, sorted_by(scheduler, cached, short)) == (["short", "cached"], ["cached", "short"])


def test_whoever_left_the_queue_is_forgotten(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()
    sorted_by(scheduler, Req("a", 100), Req("b", 100))

    sorted_by(scheduler, Req("b", 100))

    assert len(scheduler.policy.kairos.planner.mirror.lane.own) == 1


def test_nothing_is_kept_of_requests_that_sglang_has_dropped(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()
    aborted, joined = Req("aborted", 100), Req("joined", 100, output=1)
    gone = [weakref.ref(aborted), weakref.ref(joined)]
    sorted_by(scheduler, aborted)
    scheduler.waiting_queue = [joined]
    scheduler._get_new_prebuilt_batch(batch())

    sorted_by(scheduler)
    del aborted, joined
    gc.collect()

    assert [of() for of in gone] == [None, None]


def test_a_lost_prompt_comes_first_once_its_share_of_prefill_time_pays_for_it(
    scheduler_class: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAIROS_ENGINE_DEFERRED_SHARE", "0.3")
    scheduler = scheduler_class(tp_size=2)  # time is what batches were predicted to take
    lost, firsts = Req("lost", 100, kairos_ttft_s=0.05), []
    for n in range(8):
        urgent = Req(f"urgent-{n}", 100, kairos_ttft_s=9.0)
        firsts.append(sorted_by(scheduler, lost, urgent)[0])
        scheduler.process_batch_result(batch(urgent, decode=False), None)

    assert firsts.index("lost") == 4  # its 0.1 s are paid by 30 % of four batches of 0.1 s


def test_a_view_that_was_damaged_is_made_anew(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()
    waiting = [Req("slow", 100, kairos_ttft_s=9.0), Req("urgent", 100, kairos_ttft_s=1.0)]
    sorted_by(scheduler, *waiting)
    scheduler.policy.kairos.planner.mirror.lane.own.by_deadline.clear()
    sorted_by(scheduler, waiting[0])  # fails: what shall leave is not where it should be

    assert sorted_by(scheduler, *waiting) == ["urgent", "slow"]


def test_a_chunked_prompt_leaves_room_for_more_urgent_ones_in_whole_pages(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()
    waiting = [Req("urgent", 100, kairos_ttft_s=1.0), Req("later", 100, kairos_ttft_s=90.0)]
    sorted_by(scheduler, *waiting)

    limit = scheduler.policy.shortest_prefill_chunk_limit(Req("long", 4000, kairos_ttft_s=60.0), waiting, 512, 16)

    assert limit == 512 - 112


def test_it_always_goes_on_by_a_page_and_is_not_capped_for_those_that_do_not_fit(
    scheduler_class: type[Scheduler],
) -> None:
    scheduler = scheduler_class()
    waiting = [Req("urgent", 500, kairos_ttft_s=1.0)]
    sorted_by(scheduler, *waiting)

    limit = scheduler.policy.shortest_prefill_chunk_limit(Req("long", 4000, kairos_ttft_s=60.0), waiting, 512, 16)

    assert limit is None


def test_the_most_urgent_prompt_is_not_capped(scheduler_class: type[Scheduler]) -> None:
    scheduler = scheduler_class()
    waiting = [Req("later", 100, kairos_ttft_s=90.0)]
    sorted_by(scheduler, *waiting)

    limit = scheduler.policy.shortest_prefill_chunk_limit(Req("long", 4000, kairos_ttft_s=6.0), waiting, 512, 16)

    assert limit is None


def test_decode_takes_no_more_than_its_policy_admits_and_keeps_the_others_waiting(
    scheduler_class: type[Scheduler],
) -> None:
    scheduler = scheduler_class()
    scheduler.waiting_queue = [Req(f"r{n}", 100, output=1, kairos_tpot_s=0.0125) for n in range(4)]

    taken = scheduler._get_new_prebuilt_batch(batch())

    assert [req.rid for req in taken or ()] == ["r0", "r1"]  # three would take 13 ms
    assert [req.rid for req in scheduler.waiting_queue] == ["r2", "r3"]


def test_an_admission_that_fails_leaves_it_to_sglang(
    scheduler_class: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = scheduler_class()
    scheduler.waiting_queue = [Req(f"r{n}", 100) for n in range(4)]
    monkeypatch.setattr(scheduler.policy.kairos, "admitted", lambda *_: 1 / 0)

    taken = scheduler._get_new_prebuilt_batch(batch())

    assert len(taken or ()) == 4
    assert scheduler.policy.kairos.planner.counts["failed ZeroDivisionError"] == 1


def test_a_policy_that_fails_leaves_first_come_first_served(
    scheduler_class: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAIROS_ENGINE_STRATEGY", f"{__name__}:Raises+late+headroom+continuous")
    scheduler = scheduler_class()

    assert sorted_by(scheduler, Req("a", 900), Req("b", 5)) == ["a", "b"]


class Raises:
    def order(self, view: object) -> list[str]:
        raise RuntimeError("no idea")


def test_ranks_that_run_at_different_speeds_decide_alike(
    scheduler_class: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 10**9, 7))
    monkeypatch.setattr(hooks.time, "monotonic", lambda: float(next(ticks)))  # no two ranks read the same
    monkeypatch.setenv("KAIROS_ENGINE_STRATEGY", "on-time+late+headroom+envelope")
    ranks = [scheduler_class(tp_size=2) for _ in range(2)]
    orders: list[list[list[str]]] = [[], []]
    for n in range(30):
        for rank, seen in zip(ranks, orders, strict=True):
            rank.waiting_queue.append(Req(f"r{n}", 100 + 37 * n % 900, kairos_ttft_s=0.2 + n % 5))
            rank.policy.calc_priority(rank.waiting_queue)
            seen.append([req.rid for req in rank.waiting_queue])
            started = rank.waiting_queue.pop(0) if n % 2 else None
            if started is not None:
                rank.process_batch_result(batch(started, decode=False), None)
                rank.process_batch_result(batch(started), None)

    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) > 20
    assert ranks[0].policy.kairos.now_s == ranks[1].policy.kairos.now_s > 0


def test_without_being_named_the_plugin_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other")

    plugin.register()  # would fail where SGLang is not installed
