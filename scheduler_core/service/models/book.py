"""The models that serve, in memory: what was promoted anywhere serves here within a look of `Changes`."""

import logging
import time

import msgspec

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.models.artifacts import read_model
from kairos.scheduler_core.service.models.serving import Corrected, Served, Serving, configured_models
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.queries.events import EventRow, add_event, events_after, last_event
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import StepKind

_log = logging.getLogger(__name__)

Unreadable = tuple[str, int, str]
"""Profile id, version, why."""


class Book:
    """Reads what serves, and gives it to the scheduler.

    A model that cannot be read changes nothing: the one before it goes on serving, and everybody can see it.
    """

    def __init__(self, store: Store, settings: Settings, scheduler: Scheduler, metrics: Metrics) -> None:
        self._store, self._scheduler, self._metrics = store, scheduler, metrics
        self._configured = configured_models(settings)
        self._unreadable: dict[str, Unreadable] = {}
        self._seen = (-1, -1)
        """Generation of promotions, and last watched step, of the latest look."""
        self._last_event: int | None = None
        self.serving = Serving(self._configured, {})

    def configure(self, settings: Settings) -> None:
        """Take the models of a configuration; the next look lays what was promoted over them."""
        self._configured = configured_models(settings)
        self._seen = (-1, -1)

    def lost(self) -> str | None:
        """Which promoted models cannot be read, for /readyz."""
        return "; ".join(self.serving.troubles) or None

    def version_of(self, profile: str) -> str:
        """Where the step times of a profile come from that no model was promoted for."""
        profiles = self._scheduler.profiles
        return profiles.find(profile).version if profiles.knows(profile) else "prior"

    def look(self) -> None:
        """Take over what has changed.

        Raises:
            StoreError: the database is away; what served goes on serving.
        """
        with self._store.read() as connection:
            seen = queries.generation(connection), queries.watched_step(connection)
            promoted = queries.serving_models(connection) if seen[0] != self._seen[0] else None
            corrections = queries.corrections(connection) if seen != self._seen else None
            if self._last_event is None:
                self._last_event = last_event(connection)
            events = events_after(connection, self._last_event)
        found = [] if promoted is None else self._take_over(promoted)
        if corrections is not None:
            corrected: dict[tuple[str, StepKind], Corrected] = {
                (row.profile_id, msgspec.convert(row.kind, StepKind)): msgspec.convert(row.correction, Corrected)
                for row in corrections
            }
            self.serving = self.serving.with_corrections(corrected)
            self._scheduler.profiles = self._scheduler.profiles.with_serving(self.serving)
        self._count(events)
        self._seen = seen
        self._tell(found)

    def _take_over(self, promoted: dict[str, queries.ServingModel]) -> list[Unreadable]:
        """Read the models that are new; those that could not be read."""
        served: dict[str, Served] = {}
        found = []
        for profile_id, row in promoted.items():
            held = self.serving.served.get(profile_id)
            if held is not None and held.version == row.version:
                served[profile_id] = held
                self._unreadable.pop(profile_id, None)
                continue
            try:
                served[profile_id] = self._read(profile_id, row)
                self._unreadable.pop(profile_id, None)
            except InputError as error:
                found.append((profile_id, row.version, str(error)))
                if held is not None:
                    served[profile_id] = held
        self._unreadable = {p: told for p, told in self._unreadable.items() if p in promoted}
        new = [told for told in found if self._unreadable.get(told[0]) != told]
        self._unreadable |= {told[0]: told for told in found}
        troubles = tuple(why for _, _, why in self._unreadable.values())
        self.serving = Serving(self._configured, served, troubles)
        return new

    def _read(self, profile_id: str, row: queries.ServingModel) -> Served:
        with self._store.read() as connection:
            report = queries.model(connection, profile_id, row.version).report
            content = queries.model_artifact(connection, profile_id, row.version)
        learned, origins = read_model(content, f"{profile_id}@{row.version}", report)
        return Served(row.version, row.trained_at, learned, origins)

    def _count(self, events: list[EventRow]) -> None:
        """What the training process told, in metrics."""
        for event in events:
            self._last_event = event.id
            if event.kind == "training_ended":
                self._metrics.trainings.labels(event.detail["outcome"]).inc()
            elif event.kind == "trainer_ended":
                self._metrics.trainings.labels("killed").inc()
            elif event.kind == "drift":
                self._metrics.drift_alarms.labels(*event.subject.rsplit(" ", 1)).inc()
        self._metrics.model_age_s.clear()
        for profile_id, entry in self.serving.served.items():
            self._metrics.model_age_s.labels(profile_id).set(time.time() - entry.trained_at.timestamp())
        self._metrics.models_unreadable.set(len(self._unreadable))

    def _tell(self, unreadable: list[Unreadable]) -> None:
        for profile_id, version, why in unreadable:
            _log.error("%s; the model before it goes on serving", why)
            with self._store.write() as connection:
                add_event(connection, "model_unreadable", profile_id, {"version": version, "why": why})
