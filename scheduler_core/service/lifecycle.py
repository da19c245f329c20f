"""How a running service is doing, and how it changes while it runs: drained before its end, configured anew."""

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import KairosError, StoreError
from kairos.scheduler_core.service.access import Keys
from kairos.scheduler_core.service.plane import Plane, Reload
from kairos.scheduler_core.service.profiles import Profiles
from kairos.scheduler_core.service.schedule import strategies_of
from kairos.scheduler_core.service.store.queries.events import add_event

_log = logging.getLogger(__name__)

_TAKEN = {"profiles", "fleet", "slo", "guards", "strategies", "active", "access"}
"""Sections that are taken over; the others are read once, at the start."""


class Lifecycle:
    """What the process that runs the application may ask of it."""

    def __init__(self, plane: Plane, keys: Keys) -> None:
        self._plane, self._keys = plane, keys

    @property
    def keys_required(self) -> bool:
        """Whether requests need a key."""
        return self._keys.required

    def drain(self) -> None:
        """Say from now on, by /readyz, that no more requests should come."""
        self._plane.state.draining = True

    def reload(self, load: Callable[[], Settings]) -> None:
        """Take a configuration in place of the one in force; where it cannot be used, nothing changes.

        Strategies, profiles, promises, guards and the configuration's keys are taken over, each whole; what was decided
        about by REST (the active strategy, promoted models) goes on. The rest takes a restart, which is said.
        """
        scheduler, state = self._plane.scheduler, self._plane.state
        before = scheduler.settings
        try:
            settings = load()
            strategies_of(settings)
            profiles = Profiles(settings)
            for take_over in state.on_reload:
                take_over(settings)
        except KairosError as problem:
            self._tell("configuration_refused", {"problem": str(problem)})
            return
        scheduler.configure(settings, profiles)
        if self._plane.database:
            with suppress(StoreError):  # seen again, and told, within a second
                self._plane.database.changes.look("models")
        self._keys.configure(settings.access)
        once = [name for name in Settings.model_fields if name not in _TAKEN]
        waiting = [name for name in once if getattr(settings, name) != getattr(before, name)]
        self._tell("configuration_taken", {"needs_restart": waiting})

    def _tell(self, kind: str, detail: dict[str, object]) -> None:
        """To the log, /readyz, the metrics, and the events where there is a database."""
        problem = detail.get("problem")
        _log.log(logging.ERROR if problem else logging.INFO, kind.replace("_", " "), extra=detail)
        self._plane.state.last_reload = Reload(datetime.now(UTC), str(problem) if problem else None)
        self._plane.metrics.reloads.labels("refused" if problem else "taken").inc()
        if self._plane.database:
            try:
                with self._plane.database.store.write() as connection:
                    add_event(connection, kind, "configuration", detail)
            except StoreError as away:
                _log.warning("the event was not stored: %s", away)
