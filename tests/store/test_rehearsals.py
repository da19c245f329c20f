"""Whole experiments on a running service: a simulated fleet on a fast clock, real process, real database."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import yaml
from msgspec import structs
from serving import served
from simulations import workload

from kairos.adapters.dataplane.arms import Active
from kairos.adapters.dataplane.simulated import SimulatedDataPlane
from kairos.adapters.simulator.fleet import build_fleet
from kairos.adapters.simulator.run import simulate
from kairos.adapters.simulator.tables import Workload
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.experiment import Clock, Schedule, read_schedule
from kairos.scheduler_core.service.experiments.design import Lengths, Limits, Pair, Plan, Stage, counted
from kairos.scheduler_core.service.experiments.record import Record, verify

pytestmark = pytest.mark.usefixtures("store")

KEY = "the key of a rehearsal"
WARM_UP_S = 300.0
on_one_database = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
GRACE_S = 600.0
"""Ten real seconds at scale 60, which a busy machine may take to start the process for replays."""
LENGTHS = Lengths(block_s=60.0, burn_s=10.0, tail_s=5.0, settle_s=600.0, drain_p90_s=10.0)
CHAMPION = {
    "prefill": "fcfs",
    "prefill_placement": "round-robin",
    "decode_placement": "least-requests",
    "decode": "capped",
}
BETTER = {"prefill": {"name": "edf", "lost_last": True}, "prefill_placement": "late"}
STRATEGIES = {
    "champion": CHAMPION,
    "twin": CHAMPION,
    "better": CHAMPION | BETTER,
    "raises": CHAMPION | {"prefill": "dataplane.bad_policies:Raises"},
    "starves": CHAMPION | {"prefill_placement": "dataplane.bad_policies:Starves"},
}


def settings_file(folder: Path, url: str, scale: float) -> Path:
    """Two prefill instances that take 1 s a 1,000 tokens, two decode instances, time `scale` times as fast."""
    linear = {"prefill": {"a_s": 0.0, "b_s": 1e-3}, "decode": {"a_s": 0.01, "b_s": 1e-3}}
    profile = {"gpu": "g", "model": "m", "step_times": {"linear": linear}}
    document = {
        "profiles": {"p": profile},
        "fleet": {"prefill": [{"count": 2, "profile": "p"}], "decode": [{"count": 2, "profile": "p"}]},
        "slo": {"classes": {"default": {"ttft_s": 5.0, "tpot_s": 10.0}}},
        "strategies": STRATEGIES,
        "active": "champion",
        "service": {"clock_scale": scale, "schedule_key": KEY},
        "store": {"url": url},
    }
    path = folder / "kairos.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def traffic(seed: int = 0, span_s: float = 20_000.0) -> Workload:
    """Bursts of a minute or two at the edge of what the fleet can do."""
    rng = np.random.default_rng(seed)
    rate = np.repeat(rng.choice([0.5, 0.9, 1.3], round(span_s / 90.0)), 90)
    arrivals = np.sort(np.repeat(np.arange(len(rate)), n := rng.poisson(rate)) + rng.random(n.sum()))
    prompts, outputs = rng.integers(200, 2_800, len(arrivals)), rng.integers(1, 20, len(arrivals))
    return workload(arrivals.tolist(), prompts.tolist(), outputs.tolist(), ttft_target_s=5.0, tpot_target_s=10.0)


class Rehearsal:
    """A service with an experiment that has just been started, and the fleet that takes part in it."""

    def __init__(self, config: Path, address: str, challenger: str, **changes: Any) -> None:
        self.settings = load_settings(config)
        self.clock = Clock(self.settings.service.clock_scale)
        self.service = httpx.Client(base_url=address, timeout=10.0)
        self.plan = plan_between("champion@1", f"{challenger}@1", **changes)
        started = self.service.post("/experiments", json={"plan": msgspec.to_builtins(self.plan)})
        assert started.status_code == 200, started.text
        self.id = started.json()["id"]
        self.traffic = traffic()
        self.fleet = build_fleet(self.settings, step_times_of)
        self.champion = self.settings.strategies["champion"].as_strategy("champion@1")
        self.origin_s = self.schedule().slots[0].start_s - WARM_UP_S
        self.plane = SimulatedDataPlane(
            self.service, self.traffic, self.origin_s, self.fleet, self.champion, KEY.encode()
        )

    def schedule(self) -> Schedule:
        """As the service tells it now."""
        active = msgspec.json.decode(self.service.get("/strategies/active").content, type=Active)
        assert active.experiment is not None
        return read_schedule(active.experiment.schedule.encode(), KEY.encode())

    def record(self) -> Record:
        """As it stands."""
        return msgspec.json.decode(self.service.get(f"/experiments/{self.id}").content, type=Record)

    def undisturbed(self, schedule: Schedule, pairs: int) -> list[tuple[int, int, int, int]]:
        """Counted and met of both blocks of each pair, had nothing but the schedule happened."""
        strategies = {f"{name}@1": choice.as_strategy(f"{name}@1") for name, choice in self.settings.strategies.items()}
        slots = [slot for slot in schedule.slots if slot.pair is not None and slot.pair < pairs]
        turns = [(slot.start_s - self.origin_s, strategies[schedule.strategy_at(slot.start_s)]) for slot in slots]
        requests = simulate(self.traffic, self.fleet, self.champion, switches=turns).requests
        arrived_s = self.origin_s + self.traffic.arrival_s
        sides = []
        for slot in slots:
            mine = counted(arrived_s, slot, LENGTHS)
            sides.append((int(mine.sum()), int(requests.slo_met[mine].sum())))
        return [(*first, *second) for first, second in zip(sides[0::2], sides[1::2], strict=True)]

    def until(self, enough: Callable[[Record], bool], within_s: float = 60.0) -> Record:
        """Let the fleet live until the record is as wanted."""
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            self.plane.run(self.clock, self.clock.now_s() + self.clock.scale / 2)
            record = self.record()
            if enough(record):
                return record
        raise AssertionError(f"after {within_s:.0f} s: {self.record().sentence}")


def plan_between(champion: str, challenger: str, **changes: Any) -> Plan:
    """Half of the time from the first pair on."""
    fields: dict[str, Any] = dict(
        id="",
        design="switchback",
        champion=champion,
        challenger=challenger,
        lengths=LENGTHS,
        sigma=0.1,
        requests_per_pair=80.0,
        load_bounds=(300.0, 500.0, 800.0),
        seed=7,
        max_hours=1.0,
        fixed_at="2026-08-01T05:00:00Z",
        stages=(Stage(0.5, None),),
    )
    return Plan(**{**fields, **changes})


@contextmanager
def rehearsed(folder: Path, url: str, challenger: str, scale: float = 240.0, **changes: Any) -> Iterator[Rehearsal]:
    """A rehearsal on a running service."""
    config = settings_file(folder, url, scale)
    with served(config=config) as (address, _):
        yield Rehearsal(config, address, challenger, **changes)


def test_a_truly_better_strategy_is_found_with_the_right_sign(tmp_path: Path, url: str) -> None:
    with rehearsed(tmp_path, url, "better") as rehearsal:
        record = rehearsal.until(lambda record: record.verdict in ("better", "better-so-far"))

    assert record.difference_pp.mean > record.difference_pp.low > 0
    assert record.validity.replay_bias_pp is not None
    assert abs(record.validity.replay_bias_pp) < 5
    assert record.n.void == record.n.unresolved == 0
    assert verify(record) is None


@on_one_database
def test_a_strategy_against_itself_ends_in_neither(tmp_path: Path, url: str) -> None:
    ten_pairs_h = 10 * 2 * LENGTHS.block_s / 3600
    with rehearsed(tmp_path, url, "twin", max_hours=ten_pairs_h) as rehearsal:
        record = rehearsal.until(lambda record: record.stopped_at is not None)
        active = rehearsal.service.get("/strategies/active").json()

    assert record.verdict in ("undecided", "no-difference")
    assert record.difference_pp.low < 0 < record.difference_pp.high
    assert (active["name"], active["experiment"]) == ("champion", None)
    assert active["generation"] == record.generation


@on_one_database
@pytest.mark.parametrize(("challenger", "guard"), [("raises", "strategy exceptions"), ("starves", "worst wait in s")])
def test_an_absolute_guard_stops_a_bad_strategy_within_a_block(
    tmp_path: Path, url: str, challenger: str, guard: str
) -> None:
    lengths = structs.replace(LENGTHS, block_s=300.0)
    limits = Limits(error_rate_p999=0.01, decision_budget_us=1e7, ttft_target_s=2.0, worst_wait_s=10.0)
    with rehearsed(tmp_path, url, challenger, scale=60.0, lengths=lengths, limits=limits) as rehearsal:
        first = next(slot for slot in rehearsal.schedule().slots if slot.arms == "B")
        record = rehearsal.until(lambda record: record.stopped_at is not None)
        active = rehearsal.service.get("/strategies/active").json()

    assert record.verdict == "stopped-by-guard"
    assert guard in record.sentence
    assert record.stopped_at is not None
    assert datetime.fromisoformat(record.stopped_at).timestamp() - first.start_s < 2 * lengths.block_s + GRACE_S
    assert active["name"] == "champion"


def test_after_a_kill_in_the_middle_the_same_arms_go_on_with_the_same_evidence(tmp_path: Path, url: str) -> None:
    config = settings_file(tmp_path, url, 120.0)
    with served(config=config) as (address, process):
        rehearsal = Rehearsal(config, address, "better")
        schedule = rehearsal.schedule()
        before = rehearsal.until(lambda record: record.n.pairs >= 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with served(config=config) as (address, _):
        rehearsal.service.base_url = httpx.URL(address)
        again = rehearsal.schedule()
        after = rehearsal.until(lambda record: record.n.pairs >= before.n.pairs + 4)

    assert [slot.arms for slot in again.slots] == [slot.arms for slot in schedule.slots][-len(again.slots) :]
    assert [pair.log_e_better for pair in after.pairs][: len(before.pairs)] == [p.log_e_better for p in before.pairs]
    undisturbed = rehearsal.undisturbed(schedule, len(after.pairs))
    assert [_seen(pair.observed) for pair in after.pairs] == undisturbed
    assert after.n.void == 0
    assert verify(after) is None


def _seen(pair: Pair) -> tuple[int, int, int, int]:
    return pair.first.counted, pair.first.met, pair.second.counted, pair.second.met
