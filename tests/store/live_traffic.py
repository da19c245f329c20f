"""Experiments on a clock that tests set, and traffic whose fate the strategy in force decides."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from service.snapshots import scheduler_of, settings_of
from store.rows import request

from kairos.scheduler_core.experiment import Clock, Schedule, read_schedule
from kairos.scheduler_core.replay import Replay
from kairos.scheduler_core.service.experiments.design import Lengths, Plan, Stage
from kairos.scheduler_core.service.experiments.record import Record
from kairos.scheduler_core.service.live import Live
from kairos.scheduler_core.service.plane import Database, Plane
from kairos.scheduler_core.service.store.changes import Changes
from kairos.scheduler_core.service.store.queries.telemetry import RequestBatch, add_batch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer
from kairos.scheduler_core.telemetry import RequestRow

KEY = "k" * 32
CHAMPION, CHALLENGER = "kairos@1", "paper@1"
BEGIN_S = 1_800_000_000.0
HALF = (Stage(0.5, None),)
LENGTHS = Lengths(block_s=300.0, burn_s=30.0, tail_s=2.0, settle_s=10.0, drain_p90_s=30.0)


class SetClock(Clock):
    """A clock that stands still until it is set."""

    now = BEGIN_S

    def now_s(self) -> float:
        return self.now

    def in_s(self, real_s: float) -> float:
        return self.now + real_s


class Replica:
    """One service on a database; its experiments advance when `run_to` says so."""

    def __init__(self, store: Store, now_s: float = BEGIN_S, replay: Replay | None = None) -> None:
        settings = settings_of(service={"schedule_key": KEY})
        database = Database(store, Writer(store, 100_000), Changes(store))
        self.store, self.clock = store, SetClock()
        self.clock.now = now_s
        self.live = Live(Plane(settings, scheduler_of(settings), database, replay=replay), self.clock)
        assert self.live.experiments is not None
        assert self.live.runner is not None
        self.experiments, self.runner = self.live.experiments, self.live.runner

    def look(self) -> None:
        """See what other replicas wrote."""
        self.experiments.database.changes.look("experiments")
        self.experiments.database.changes.look("strategies")

    def tick_at(self, now_s: float) -> None:
        """Bring experiments up to this instant."""
        self.clock.now = now_s
        self.look()
        self.runner.tick()

    @property
    def schedule(self) -> Schedule:
        """As a data plane reads it."""
        assert self.experiments.running is not None
        signed, _ = self.experiments.signed(self.experiments.running)
        return read_schedule(signed.encode(), KEY.encode())

    @property
    def active(self) -> tuple[str, int]:
        """What data planes run, and its generation."""
        known = self.live.strategies.known
        return known.active.strategy.name, known.generation

    def record(self, experiment_id: str = "exp_01") -> Record:
        """As it stands."""
        record = self.experiments.record(experiment_id)
        assert isinstance(record, Record)
        return record


def plan(**changes: Any) -> Plan:
    """Of the two, without a ramp-up and with strata for 0.5, 0.7, 0.9 and 1.1 requests a second."""
    fields: dict[str, Any] = {"id": "", "design": "switchback", "champion": CHAMPION, "challenger": CHALLENGER}
    fields |= {"lengths": LENGTHS, "sigma": 0.03, "requests_per_pair": 500.0, "load_bounds": (288.0, 384.0, 480.0)}
    fields |= {"seed": 3, "max_hours": 20.0, "fixed_at": "2027-01-15T08:00:00Z", "stages": HALF}
    return Plan(**fields | changes)


Fate = Callable[[str, float], dict[str, Any]]
"""What becomes of a request: fields of its row, by the strategy that serves it and a number drawn from [0, 1)."""


def attains(champion: float, challenger: float) -> Fate:
    """So large shares of requests meet their targets, a sixtieth more or less by turns of luck."""

    def fate(strategy: str, drawn: float) -> dict[str, Any]:
        return {"ttft_ms": 500.0 if drawn < (challenger if strategy == CHALLENGER else champion) else 3000.0}

    return fate


def rows(
    schedule: Schedule,
    from_s: float,
    until_s: float,
    fate: Fate,
    per_s: float = 1.0,
    serves: Callable[[float], str] | None = None,
) -> list[dict[str, Any]]:
    """The same arrivals whoever serves them (else: what the schedule says), evenly spread."""
    arrivals = np.arange(from_s, until_s, 1.0 / per_s)
    drawn = np.random.default_rng(int(from_s)).random(len(arrivals))
    targets = {"ttft_target_ms": 2000.0, "tpot_target_ms": 50.0, "wait_ms": 5.0}
    made = []
    for at_s, luck in zip(arrivals.tolist(), drawn.tolist(), strict=True):
        strategy = (serves or schedule.strategy_at)(at_s)
        made.append(request(arrived_at_s=at_s, strategy=strategy, **targets) | fate(strategy, luck))
    return made


def store_rows(store: Store, batch_id: str, sent: list[dict[str, Any]]) -> None:
    """Telemetry, as the service stores it."""
    batch = RequestBatch(batch_id, b"0" * 16, msgspec.convert(sent, list[RequestRow]))
    with store.write() as connection:
        add_batch(connection, batch)
