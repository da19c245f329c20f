"""Shadow: what it says of decisions and of recorded arrivals, and that it changes nothing."""

from typing import Any

import msgspec
import numpy as np
import pytest
from service.snapshots import decode, prefill, snapshot, waits
from simulations import fleet
from store.live_traffic import BEGIN_S, CHAMPION, Replica, store_rows
from store.rows import request
from store.test_experiments import EMBEDDED

from kairos.adapters.simulator.replay import SimulatedReplay
from kairos.scheduler_core.service.experiments.shadow import (
    Block,
    Sample,
    ShadowPlan,
    ShadowRecord,
    batch_interval,
    shadow_record,
)
from kairos.scheduler_core.service.schedule import Decided
from kairos.scheduler_core.service.schemas import Snapshot
from kairos.scheduler_core.service.store.queries import experiments as queries
from kairos.scheduler_core.service.store.session import Store

PLAN = ShadowPlan(id="", champion=CHAMPION, challenger="tuned@1", fixed_at="2027-01-15T08:00:00Z", share=1.0)


def decided(replica: Replica, body: dict[str, Any]) -> Decided:
    """What the champion decides for a snapshot, as a watcher is told."""
    scheduler = replica.live.experiments.plane.scheduler  # type: ignore[union-attr]
    told: list[Decided] = []
    scheduler.watchers = (*scheduler.watchers, told.append)
    content = msgspec.json.encode(body)
    scheduler.schedule(msgspec.json.decode(content, type=Snapshot), BEGIN_S, content)
    return told[0]


CROWDED = snapshot(
    prefill(), decode(), waiting=[waits("long", 9_000, -1.0), waits("short", 500, -0.5), waits("late", 4_000, -30.0)]
)


@EMBEDDED
def test_a_shadow_looks_at_decisions_and_acts_on_none(store: Store) -> None:
    replica = Replica(store)
    started = replica.experiments.start(PLAN)
    assert replica.live.shadow is not None
    replica.live.shadow.look(decided(replica, CROWDED))
    replica.live.shadow.look(decided(replica, CROWDED))  # the same decision counts once
    record = replica.experiments.record(started.id)

    assert isinstance(record, ShadowRecord)
    assert (record.agreement.decisions, record.verdict) == (1, "shadow")
    assert replica.experiments.running is None
    assert replica.active == (CHAMPION, 1)
    assert replica.experiments.stop(started.id).stopped_at is not None
    assert replica.active == (CHAMPION, 1)


@EMBEDDED
def test_a_strategy_in_its_own_shadow_agrees_with_itself(store: Store) -> None:
    replica = Replica(store)
    replica.live.strategies.put("copy", replica.experiments.plane.settings.strategies["kairos"])
    started = replica.experiments.start(msgspec.structs.replace(PLAN, challenger="copy@1"))
    assert replica.live.shadow is not None
    replica.live.shadow.look(decided(replica, CROWDED))
    record = replica.experiments.record(started.id)

    assert isinstance(record, ShadowRecord)
    assert (record.agreement.share, record.agreement.kendall_tau) == (1.0, 1.0)
    assert record.predicted_on_time_per_1000_decisions.mean == 0.0


@EMBEDDED
def test_blocks_are_replayed_with_both_strategies(store: Store) -> None:
    replay = SimulatedReplay(fleet(prefill=2, decode=2), deferred_share=0.05)
    replica = Replica(store, replay=replay)
    started = replica.experiments.start(PLAN)
    seconds = np.arange(0.0, 600.0, 5.0)
    targets = {"ttft_target_ms": 2000.0, "tpot_target_ms": 50.0, "ttft_ms": 500.0, "wait_ms": 1.0}
    store_rows(store, "all", [request(arrived_at_s=BEGIN_S + 5.0 + s, **targets) for s in seconds.tolist()])
    replica.tick_at(BEGIN_S + 5.0 + 600.0 + 100.0)
    replica.runner.stop()
    with store.read() as connection:
        blocks = msgspec.convert(queries.pairs(connection, started.id, "block"), list[Block])

    assert [(block.requests, block.real, block.champion) for block in blocks] == [(60, 1.0, 1.0)] * 2


def test_a_replay_that_is_not_like_the_champion_is_not_trusted() -> None:
    def record(bias: float) -> ShadowRecord:
        real = [0.5 + 0.02 * k for k in range(20)]
        blocks = [Block(300.0 * k, 100, y, y + bias, y + bias + 0.01) for k, y in enumerate(real)]
        return shadow_record(PLAN, [Sample(1.0, None, 1.0, 3, 0, False)], blocks, "", None)

    assert record(0.01).replay.difference_pp is not None
    assert record(0.05).replay.difference_pp is None
    assert "not trusted" in record(0.05).sentence


def test_no_sentence_of_a_shadow_claims_an_effect() -> None:
    samples = [Sample(float(k), "order", 0.5, 10, 2, False) for k in range(50)]
    blocks = [Block(300.0 * k, 100, 0.5 + 0.02 * k, 0.5 + 0.02 * k, 0.9) for k in range(20)]
    said = shadow_record(PLAN, samples, blocks, "", None).sentence

    assert not {"better", "winner", "significant", "improved"} & set(said.replace(",", " ").split())
    assert "predicted" in said


def test_neighbours_that_are_alike_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    steady = np.repeat(rng.standard_normal(20), 10)
    apart, joined = batch_interval(rng.permutation(steady)), batch_interval(np.sort(steady))

    assert apart.low is not None
    assert apart.high is not None
    assert joined.low is not None
    assert joined.high is not None
    assert joined.high - joined.low > apart.high - apart.low


def test_few_values_have_a_mean_and_no_interval() -> None:
    assert batch_interval(np.array([1.0, 3.0])).low is None
    assert batch_interval(np.array([1.0, 3.0])).mean == pytest.approx(2.0)
