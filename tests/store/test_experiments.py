"""Experiments through the store: pairs close once, a restart changes nothing, guards act, the champion comes back."""

from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import structs
from service.snapshots import PROFILES, settings_of
from simulations import fleet
from store.live_traffic import (
    BEGIN_S,
    CHALLENGER,
    CHAMPION,
    Fate,
    Replica,
    attains,
    plan,
    rows,
    store_rows,
)
from store.rows import request

from kairos.adapters.simulator.replay import SimulatedReplay
from kairos.scheduler_core.errors import ConflictError, FieldsError
from kairos.scheduler_core.service.experiments.checks import check_instances, check_plan, divisible
from kairos.scheduler_core.service.experiments.design import RAMP_UP, Limits, Stage
from kairos.scheduler_core.service.experiments.planning import Question, plan_from
from kairos.scheduler_core.service.experiments.record import verify
from kairos.scheduler_core.service.store.queries import experiments as queries
from kairos.scheduler_core.service.store.queries.events import latest_events
from kairos.scheduler_core.service.store.session import Store

STARTED_S = BEGIN_S + 5.0
PAIR_S = 600.0
CLOSED_S = 20.0
"""After its end, when telemetry has settled."""


EMBEDDED = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


def run(replica: Replica, until_pair: int, fate: Fate, from_pair: int = 0) -> None:
    """Traffic pair by pair, each closed before the next, while the experiment runs."""
    for i in range(from_pair, until_pair):
        if replica.experiments.running is None:
            return
        begin_s = STARTED_S + i * PAIR_S
        sent = rows(replica.schedule, begin_s, begin_s + PAIR_S, fate, per_s=0.5 + 0.2 * (i % 4))
        store_rows(replica.store, f"pair {i}", sent)
        replica.tick_at(begin_s + PAIR_S + CLOSED_S)


def test_a_gain_ends_better_with_the_champion_back_and_a_record_that_verifies(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    run(replica, 40, attains(0.7, 0.8))
    replica.look()
    record = replica.record()

    assert (record.verdict, record.stopped_at is not None) == ("better", True)
    assert (replica.experiments.running, replica.active) == (None, (CHAMPION, 2))
    assert record.generation == 2
    assert verify(record) is None
    with store.read() as connection:
        assert [event.kind for event in latest_events(connection, 5)] == ["experiment_ended", "experiment_started"]


@EMBEDDED
def test_a_changed_figure_of_a_record_is_named(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    run(replica, 3, attains(0.7, 0.8))
    record = replica.record()
    pair = record.pairs[1]
    observed = msgspec.structs.replace(pair.observed.first, met=pair.observed.first.met + 1)
    changed = msgspec.structs.replace(pair, observed=msgspec.structs.replace(pair.observed, first=observed))

    pairs = (record.pairs[0], changed, *record.pairs[2:])
    difference = verify(msgspec.structs.replace(record, pairs=pairs))

    assert "the record says" in str(difference)


@EMBEDDED
def test_harm_ends_the_experiment(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    run(replica, 40, attains(0.8, 0.6))

    assert replica.record().verdict == "worse"
    assert replica.record().n.pairs < 20


def test_a_restart_goes_on_with_the_same_arms_and_the_same_evidence(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    run(replica, 6, attains(0.75, 0.78))
    slots, evidence = replica.schedule.slots, replica.record().evidence
    again = Replica(store, now_s=STARTED_S + 6 * PAIR_S + CLOSED_S)
    again.runner.tick()  # the first one holds the work

    assert again.schedule.slots == slots
    assert again.record().evidence == evidence
    assert [pair.observed.i for pair in again.record().pairs] == list(range(6))


def test_of_two_replicas_one_works_and_the_other_takes_over_with_the_same_pairs(store: Store) -> None:
    first, second = Replica(store), Replica(store)
    first.experiments.start(plan())
    run(first, 3, attains(0.75, 0.78))
    second.look()
    store_rows(store, "pair 3", rows(first.schedule, STARTED_S + 3 * PAIR_S, STARTED_S + 4 * PAIR_S, attains(0.7, 0.7)))
    second.tick_at(STARTED_S + 4 * PAIR_S + CLOSED_S)
    before = len(second.record().pairs)
    first.runner.start()
    first.runner.stop()  # gives the work back
    second.tick_at(STARTED_S + 4 * PAIR_S + CLOSED_S)

    assert (before, len(second.record().pairs)) == (3, 4)
    assert second.record().pairs[:3] == first.record().pairs[:3]


def test_late_telemetry_of_a_closed_pair_counts_as_unresolved_and_changes_nothing(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    sent = rows(replica.schedule, STARTED_S, STARTED_S + PAIR_S, attains(1.0, 1.0))
    on_time, late = sent[:200], sent[200:]
    counted = [r for r in sent if STARTED_S + 30 <= r["arrived_at_s"] < STARTED_S + 298]
    arm = "challenger" if replica.schedule.slots[0].arms == "B" else "champion"
    with store.write() as connection:
        body = {"slot_start_s": STARTED_S, arm: {"requests": len(counted)}}
        queries.put_report(connection, "exp_01", "gateway-0", STARTED_S, body)
    store_rows(store, "on time", on_time)
    replica.tick_at(STARTED_S + PAIR_S + CLOSED_S)
    before = replica.record().pairs
    store_rows(store, "late", late)
    replica.tick_at(STARTED_S + PAIR_S + 2 * CLOSED_S)
    first = before[0].observed.first

    assert replica.record().pairs == before
    assert (first.counted, first.met, first.unresolved) == (268, 170, 98)


@EMBEDDED
def test_reports_that_are_missing_leave_the_arm_to_the_requests_own_word(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    sent = rows(replica.schedule, STARTED_S, STARTED_S + PAIR_S, attains(1.0, 1.0))
    store_rows(store, "pair 0", [row | {"strategy": CHAMPION} for row in sent])
    replica.tick_at(STARTED_S + PAIR_S + CLOSED_S)
    pair = replica.record().pairs[0]

    assert pair.void
    assert (pair.observed.first.wrong_arm + pair.observed.second.wrong_arm) == 268


GUARDED = plan(limits=Limits(error_rate_p999=0.0, decision_budget_us=1000.0, ttft_target_s=2.0, worst_wait_s=1.0))


@EMBEDDED
@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ({"challenger": {"decisions": 100, "exceptions": 1}}, "strategy exceptions"),
        ({"challenger": {"decisions": 100, "fallbacks": 2}}, "guard fallback share"),
        ({"challenger": {"decisions": 100, "decision_p99_us": 2000.0}}, "decision p99 in us"),
        ({"healthy": False}, "lost health checks"),
    ],
)
def test_an_absolute_guard_acts_within_the_block(store: Store, reported: dict[str, Any], name: str) -> None:
    replica = Replica(store)
    replica.experiments.start(GUARDED)
    slot = next(slot for slot in replica.schedule.slots if slot.arms == "B")
    with store.write() as connection:
        queries.put_report(connection, "exp_01", "gateway-0", slot.start_s, {"slot_start_s": slot.start_s} | reported)
    replica.tick_at(slot.start_s + 60.0)
    record = replica.record()

    assert (record.verdict, replica.active) == ("stopped-by-guard", (CHAMPION, 2))
    assert name in record.sentence


@EMBEDDED
@pytest.mark.parametrize(
    ("fate", "name"), [({"status": "failed"}, "error rate"), ({"wait_ms": 60_000.0}, "worst wait in s")]
)
def test_failures_and_waits_that_the_champion_would_not_have_had_are_guards_too(
    store: Store, fate: dict[str, Any], name: str
) -> None:
    replica = Replica(store, replay=SimulatedReplay(fleet(prefill=2, decode=2), deferred_share=0.05))
    replica.experiments.start(GUARDED)
    slot = next(slot for slot in replica.schedule.slots if slot.arms == "B")
    store_rows(store, "slot", rows(replica.schedule, slot.start_s, slot.start_s + 60.0, lambda strategy, luck: fate))
    replica.tick_at(slot.start_s + 60.0)
    replica.runner.stop()
    ending = replica.record().ending

    assert ending is not None
    assert ending.breach is not None
    assert ending.breach.name == name


@EMBEDDED
def test_a_replay_gives_each_side_its_covariate(store: Store) -> None:
    replica = Replica(store, replay=SimulatedReplay(fleet(prefill=2, decode=2), deferred_share=0.05))
    replica.experiments.start(plan())
    run(replica, 1, attains(0.7, 0.8))
    replica.runner.stop()
    pair = replica.record().pairs[0].observed

    assert (pair.first.replayed, pair.second.replayed) == (1.0, 1.0)  # half a request a second, 0.48 s each


@EMBEDDED
def test_a_stage_of_the_ramp_up_leaves_the_champion_alone_and_pairs_it_with_itself(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan(stages=(Stage(0.25, 1), Stage(0.5, None))))
    fate = attains(0.8, 0.8)
    store_rows(store, "stage", rows(replica.schedule, STARTED_S, STARTED_S + 2400.0, fate))
    replica.tick_at(STARTED_S + 2400.0 + CLOSED_S)
    record = replica.record()

    assert [pair.observed.i for pair in record.pairs] == [0, 1, 2]
    assert [pair.i for pair in record.champion_alone.pairs] == [0]
    assert verify(record) is None


@EMBEDDED
def test_requests_behind_the_other_strategys_work_are_contaminated(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())
    slow = rows(replica.schedule, STARTED_S, STARTED_S + PAIR_S, lambda strategy, luck: {"ttft_ms": 90_000.0})
    store_rows(store, "pair 0", slow)
    replica.tick_at(STARTED_S + PAIR_S + CLOSED_S)
    second = replica.record().pairs[0].observed.second

    assert second.contaminated == 59  # from the burn-in's end at 30 s until the last one from before, at 299 + 90 s


@EMBEDDED
def test_pools_run_side_by_side(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan(design="pools"))
    schedule = replica.schedule
    sent = []
    for row in rows(schedule, STARTED_S, STARTED_S + 300.0, attains(1.0, 1.0)):
        pool = int(row["arrived_at_s"]) % 2
        strategy = schedule.strategy_at(row["arrived_at_s"], pool)
        sent.append(row | {"pool": pool, "strategy": strategy, "ttft_ms": 9000.0 if strategy == CHALLENGER else 9.0})
    store_rows(store, "pair 0", sent)
    replica.tick_at(STARTED_S + 300.0 + CLOSED_S)
    pair = replica.record().pairs[0]

    assert (pair.observed.first.counted, pair.observed.second.counted, pair.void) == (134, 134, False)
    assert replica.record().difference_pp.mean == pytest.approx(-100.0)


def test_sticky_counts_sessions_first_seen_in_a_block_for_the_arm_they_drew(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan(design="sticky"))
    schedule = replica.schedule
    sent = []
    for row in rows(schedule, STARTED_S, STARTED_S + 600.0, attains(1.0, 1.0), serves=lambda at_s: ""):
        session = f"s{int(row['arrived_at_s'] - STARTED_S) % 400}"  # 300 begin in the first block, 100 in the second
        sent.append(row | {"session": session, "strategy": schedule.strategy_of(session, row["arrived_at_s"])})
    store_rows(store, "both", sent)
    replica.tick_at(STARTED_S + 600.0 + CLOSED_S)
    first, second = (pair.observed for pair in replica.record().pairs)
    drawn = [schedule.strategy_of(f"s{k}", STARTED_S) == CHALLENGER for k in range(30, 298)]

    assert (first.first.counted, first.second.counted) == (sum(drawn), 268 - sum(drawn))
    assert second.first.sessions + second.second.sessions == 100 - 30
    assert (first.first.wrong_arm, first.second.wrong_arm) == (0, 0)


def test_one_experiment_runs_at_a_time_and_forbids_another_active_strategy(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan())

    with pytest.raises(ConflictError, match="exp_01 runs"):
        replica.experiments.start(plan())
    with pytest.raises(ConflictError, match="stop_experiment"):
        replica.live.strategies.activate("tuned", None)
    replica.live.strategies.activate("tuned", None, stop_experiment=True)
    assert (replica.record().verdict, replica.active) == ("stopped-by-user", ("tuned@1", 3))


@EMBEDDED
def test_the_time_of_an_experiment_ends_it_undecided(store: Store) -> None:
    replica = Replica(store)
    replica.experiments.start(plan(max_hours=1.0))
    run(replica, 6, attains(0.8, 0.8))
    replica.tick_at(STARTED_S + 3600.0 + 2 * CLOSED_S)

    assert replica.record().verdict == "undecided"
    assert replica.experiments.running is None


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"challenger": CHAMPION}, "challenger"),
        ({"sigma": 0.0}, "sigma"),
        ({"max_hours": float("nan")}, "max_hours"),
        ({"load_bounds": (3.0, 2.0, 1.0)}, "load_bounds"),
        ({"stages": ()}, "stages"),
        ({"stages": (Stage(0.9, None),)}, "stages[0].share"),
        ({"guards": {"error rate": float("inf")}}, "guards.error rate"),
        ({"design": "sticky", "stages": (Stage(0.5, 2), Stage(0.25, None))}, "stages[1].share"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_by_its_field(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(FieldsError) as raised:
        check_plan(plan(**changes))

    assert path in [where for where, _ in raised.value.problems]


FOUR = [{"count": 4, "profile": "even"}]
MANY = [{"url": "dns+http://engines:8000", "profile": "even"}]


@pytest.mark.parametrize(
    ("prefill", "shares", "refused"),
    [
        (FOUR, (0.25, 0.5), []),
        (FOUR, (0.05, 0.25, 0.4, 0.5), ["stages[0].share", "stages[2].share"]),
        ([{"profile": "even"}], (0.5,), ["stages[0].share"]),
        ([{"profile": "even"}, {"profile": "other"}], (0.5,), ["design"]),
        (MANY, (0.05, 0.5), []),
    ],
)
def test_the_arms_of_sticky_need_as_large_a_share_of_instances_as_of_sessions(
    prefill: list[dict[str, Any]], shares: tuple[float, ...], refused: list[str]
) -> None:
    profiles = {"even": PROFILES["even"], "other": PROFILES["even"]}
    decode = MANY if prefill is MANY else FOUR
    fleet = settings_of(profiles=profiles, fleet={"prefill": prefill, "decode": decode}).fleet
    stages = (*(Stage(share, 1) for share in shares[:-1]), Stage(shares[-1], None))
    sticky = plan(design="sticky", stages=stages)
    told: list[str] = []
    try:
        check_instances(sticky, fleet)
    except FieldsError as problem:
        told = [where for where, _ in problem.problems]

    check_instances(structs.replace(sticky, shared_queue=True), fleet)
    assert told == refused


def test_a_ramp_up_of_sticky_leaves_out_what_the_instances_cannot_be_divided_for() -> None:
    fleet = settings_of(fleet={"prefill": FOUR, "decode": FOUR}).fleet

    assert [stage.share for stage in divisible(RAMP_UP, fleet)] == [0.25, 0.5]


def question(**changes: Any) -> Question:
    fields: dict[str, Any] = {"design": "switchback", "champion": CHAMPION, "challenger": CHALLENGER, "seed": 3}
    return Question(**fields | {"fixed_at": "2027-01-15T08:00:00Z", "decision_budget_us": 5e4} | changes)


def history(store: Store, hours: float, **fields: Any) -> Any:
    seconds = np.arange(0.0, 3600.0 * hours, 2.0)
    made = [request(arrived_at_s=BEGIN_S + s, ttft_target_ms=2000.0, wait_ms=5.0, **fields) for s in seconds.tolist()]
    store_rows(store, "history", made)
    return queries.read_outcomes(store, BEGIN_S, BEGIN_S + 3600.0 * hours)


@EMBEDDED
def test_a_plan_takes_lengths_loads_and_guards_from_history(store: Store) -> None:
    made = plan_from(question(), history(store, 3), None)

    assert (made.lengths.block_s, made.requests_per_pair) == (300.0, pytest.approx(297, abs=3))
    assert made.load_bounds == pytest.approx((240.0, 240.0, 240.0))
    assert {"error rate", "missed, longest prompts"} <= set(made.guards)
    assert made.limits is not None
    assert made.limits.worst_wait_s == pytest.approx(0.005)


@EMBEDDED
def test_a_history_too_short_and_a_queue_that_does_not_drain_are_not_measurable(store: Store) -> None:
    short = history(store, 1)

    with pytest.raises(Exception, match="not measurable yet: the history of kairos@1 holds 5 whole pairs"):
        plan_from(question(), short, None)
    with pytest.raises(Exception, match="not measurable by switchback"):
        plan_from(question(drain_s=800.0), short, None)
