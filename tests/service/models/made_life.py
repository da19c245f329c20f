"""A store with steps of one profile, and the work of a training process on it, in this process."""

from typing import Any

import msgspec
import numpy as np
from made_telemetry import PROFILE, decode_s, prefill_s
from service.snapshots import settings_of

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.service.models.lifecycle import Lifecycle
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.queries.telemetry import StepBatch, add_batch
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import StepRow

ID = PROFILE.profile_id
START_S = 1.7e9
HOUR_S = 3600.0


def step_rows(
    n: int, factor: float = 1.0, start_s: float = START_S, hours: float = 3.0, seed: int = 0
) -> list[StepRow]:
    """Decode steps of the profile over some hours, `factor` times as long as usual."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(1, 33, n)
    context = batch * rng.integers(100, 4000, n)
    noise = np.exp(0.02 * rng.normal(size=n))
    return [
        StepRow(
            **msgspec.structs.asdict(PROFILE),
            latency_ms=1e3 * factor * decode_s(b, c) * e,
            batch_size=b,
            sum_context_tokens=c,
            prev_phase="decode",
            ended_at_s=start_s + hours * HOUR_S * k / n,
        )
        for k, (b, c, e) in enumerate(zip(batch.tolist(), context.tolist(), noise.tolist(), strict=True))
    ]


def prefill_rows(n: int, start_s: float) -> list[StepRow]:
    """Prefill steps of the profile over three hours."""
    rng = np.random.default_rng(0)
    new = rng.integers(100, 8_000, n)
    noise = np.exp(0.02 * rng.normal(size=n))
    return [
        StepRow(
            **msgspec.structs.asdict(PROFILE),
            latency_ms=1e3 * prefill_s(tokens, 0) * e,
            n_requests=1,
            new_tokens=tokens,
            ended_at_s=start_s + 3 * HOUR_S * k / n,
        )
        for k, (tokens, e) in enumerate(zip(new.tolist(), noise.tolist(), strict=True))
    ]


class Life:
    """What a training process would do, one piece after the other."""

    def __init__(self, store: Store, settings: Settings | None = None, holder: str = "me", **training: Any) -> None:
        self.store = store
        self.settings = settings or settings_of(training={"after_rows": None, "every_s": None} | training)
        self.lifecycle = Lifecycle(store, self.settings, holder)
        self.hours = 0.0
        self.batches = 0

    def steps(self, n: int, factor: float = 1.0) -> None:
        """Steps come in, over three more hours, and are watched and judged."""
        self._come(step_rows(n, factor, START_S + self.hours * HOUR_S, seed=self.batches))

    def prefill_steps(self, n: int) -> None:
        """The same of prefill steps."""
        self._come(prefill_rows(n, START_S + self.hours * HOUR_S))

    def _come(self, rows: list[StepRow]) -> None:
        self.hours += 3.0
        self.batches += 1
        with self.store.write() as connection:
            add_batch(connection, StepBatch(f"b-{self.batches}", b"0" * 16, rows))
        self.work()

    def work(self) -> None:
        """Until there is nothing to do."""
        while self.lifecycle.go_on():
            pass

    def train(self) -> None:
        """Somebody asks for a training, and it is done."""
        with self.store.write() as connection:
            queries.ask_training(connection, "request", None)
        self.work()

    def restarted(self) -> "Life":
        """Another process in the place of this one."""
        other = Life(self.store, self.settings)
        other.hours, other.batches = self.hours, self.batches
        return other

    @property
    def serving(self) -> int:
        """The version that serves; 0: none."""
        with self.store.read() as connection:
            found = queries.serving_models(connection).get(ID)
        return found.version if found else 0

    @property
    def models(self) -> list[queries.ModelRow]:
        """All models."""
        with self.store.read() as connection:
            return queries.models(connection)

    def gate(self, version: int) -> str:
        """What the gate said of a version's decode steps."""
        report = next(row.report for row in self.models if row.version == version)
        return str((report or {})["gate"]["decode"]["word"])
