"""The strategies of a running service: versions that never change, and which one is active, switched without restart.

A version is `name@version`. With a store, versions and activations live there, every replica sees a change within two
seconds, and what the configuration says is kept as a version when the service starts. Without one there is what the
configuration says, as version 0.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from kairos.scheduler_core.config import Settings, StrategySettings
from kairos.scheduler_core.errors import ConfigError, ConflictError, InputError, UnknownNameError
from kairos.scheduler_core.service.plane import Database, Plane
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.queries import strategies as queries
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.strategy import Strategy, not_applied

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a strategy that can be used here."""

    name: str
    version: int
    policies: dict[str, Any]
    """As the configuration writes them."""
    strategy: Strategy
    created_at: datetime | None
    """None: of the configuration."""


@dataclass(frozen=True, slots=True)
class Known:
    """What there is, read at one moment; replaced whole."""

    state: tuple[int, int]
    versions: dict[str, Version]
    """By `name@version`, oldest first."""
    active: Version
    generation: int

    def newest(self, name: str) -> Version:
        """The highest version of a name.

        Raises:
            UnknownNameError: there is no such strategy.
        """
        found = [version for version in self.versions.values() if version.name == name]
        if not found:
            raise UnknownNameError("strategy", name, {version.name for version in self.versions.values()})
        return max(found, key=lambda version: version.version)

    def find(self, name: str, version: int | None) -> Version:
        """A version of a name; None: the highest.

        Raises:
            UnknownNameError: there is no such strategy, or no such version of it.
        """
        newest = self.newest(name)
        return newest if version is None else self.named(f"{name}@{version}")

    def named(self, text: str) -> Version:
        """A version by `name@version`.

        Raises:
            UnknownNameError: there is none.
        """
        if text not in self.versions:
            raise UnknownNameError("strategy version", text, self.versions)
        return self.versions[text]


class Strategies:
    """Keeps versions, activates them, and gives the scheduler what is in force."""

    def __init__(self, plane: Plane) -> None:
        """Keep what the configuration says, and take over what the store says.

        Raises:
            StoreError: the database is away.
        """
        self.plane = plane
        self._unusable: set[str] = set()
        self.before_change: Callable[[Connection, bool], None] = lambda connection, stop_experiment: None
        """Asked in the transaction of every change of the active strategy; raises where it must not be."""
        self.configure(plane.settings)
        plane.state.on_reload.append(self.configure)
        if plane.database:
            plane.database.changes.watch("strategies", self._look)

    def configure(self, settings: Settings) -> None:
        """Keep what a configuration says, and take over what the store says; without one, the configuration's.

        Raises:
            StoreError: the database is away; nothing changed.
        """
        configured = {name: _as_written(choice) for name, choice in settings.strategies.items()}
        if self.plane.database is None:
            versions = {f"{name}@0": _version(name, 0, policies, None) for name, policies in configured.items()}
            self.known = Known((0, 0), versions, versions[f"{settings.active}@0"], 0)
            self.plane.scheduler.strategies = {version.name: version.strategy for version in versions.values()}
            self.plane.scheduler.active = settings.active
            return
        with self.plane.database.store.write() as connection:
            queries.seed_strategies(connection, configured, settings.active)
        self.known = self._read((0, 0))
        self._take_over()

    # -- changes

    def put(self, name: str, settings: StrategySettings) -> tuple[Version, list[str]]:
        """Keep a version of a strategy; and what of it the fleet's control does not apply.

        Raises:
            UnknownPolicyError, ConfigError: a policy is not installed, or does not take its parameters.
            InputError: nothing can be kept.
        """
        database = self.database()
        policies = _as_written(settings)
        _refuse_modules(policies)
        strategy = settings.as_strategy(name).check()
        with database.store.write() as connection:
            version = queries.add_strategy(connection, name, policies)
            announce(connection, "strategies")
        database.changes.look("strategies")
        return self.known.find(name, version), self.warnings(strategy)

    def activate(self, name: str, version: int | None, stop_experiment: bool = False) -> Known:
        """Use a version from now on, the newest one where none is named; what is in force then.

        Args:
            stop_experiment: end the one that compares the active strategy with another, which otherwise forbids it.

        Raises:
            UnknownNameError: there is no such version.
            ConflictError: an experiment runs.
            InputError: nothing can be kept.
        """
        database = self.database()
        chosen = self.known.find(name, version)
        with database.store.write() as connection:
            self.before_change(connection, stop_experiment)
            generation = queries.activate_strategy(connection, name, chosen.version)
            add_event(connection, "strategy_activated", f"{name}@{chosen.version}", {"generation": generation})
            announce(connection, "strategies")
        database.changes.look("experiments")
        database.changes.look("strategies")
        return self.known

    def rollback(self) -> Known:
        """Use again what was active before; what is in force then.

        Raises:
            ConflictError: nothing else was active before.
            InputError: nothing can be kept.
        """
        database = self.database()
        with database.store.read() as connection:
            earlier = queries.earlier_strategy(connection)
        if earlier is None:
            raise ConflictError("no other strategy was active before this one; activate one by name")
        return self.activate(*earlier)

    def warnings(self, strategy: Strategy) -> list[str]:
        """What a strategy asks for that `control` in the configured fleet does not let it do."""
        fleet = self.plane.settings.fleet
        return not_applied(strategy, [group.control for group in fleet.prefill], [g.control for g in fleet.decode])

    def database(self) -> Database:
        """Where versions are kept.

        Raises:
            InputError: nothing is kept.
        """
        if self.plane.database is None:
            raise InputError("this service keeps nothing, so strategies cannot be changed; configure a store")
        return self.plane.database

    # -- what is in force

    def _look(self) -> None:
        known = self._read(self.known.state)
        if known is not self.known:
            self.known = known
            self._take_over()

    def _read(self, state: tuple[int, int]) -> Known:
        """What the store holds; what is known already, where nothing changed."""
        with self.database().store.read() as connection:
            found = queries.strategies_state(connection)
            if found == state:
                return self.known
            rows = queries.strategy_versions(connection)
            active = queries.active_strategy(connection)
        versions = {}
        for row in rows:
            try:
                versions[f"{row.name}@{row.version}"] = _version(*row)
            except (ConfigError, UnknownNameError) as problem:
                self._note_unusable(f"{row.name}@{row.version}", problem)
        assert active is not None  # seeded
        key = f"{active.name}@{active.version}"
        if key not in versions:  # another release's policy: what was in force goes on here
            return Known(found, versions, self.known.active, self.known.generation)
        return Known(found, versions, versions[key], active.generation)

    def _note_unusable(self, name: str, problem: InputError) -> None:
        if name not in self._unusable:
            self._unusable.add(name)
            _log.warning("strategy %s of the store cannot be used here: %s", name, problem)

    def _take_over(self) -> None:
        """Give the scheduler every version by `name@version`, and by its name the active one or the newest."""
        scheduler, known = self.plane.scheduler, self.known
        by_name = {version.name: version.strategy for version in known.versions.values()}
        by_name[known.active.name] = known.active.strategy
        by_version = {key: version.strategy for key, version in known.versions.items()}
        scheduler.strategies = by_name | by_version
        scheduler.active = known.active.strategy.name


def _version(name: str, version: int, policies: dict[str, Any], created_at: datetime | None) -> Version:
    known_as = f"{name}@{version}" if version else name
    strategy = StrategySettings.model_validate(policies).as_strategy(known_as).check()
    return Version(name, version, policies, strategy, created_at)


def _as_written(settings: StrategySettings) -> dict[str, Any]:
    """The policies as the store keeps them."""
    return settings.model_dump(mode="json")


def _refuse_modules(policies: dict[str, Any]) -> None:
    for slot in policies.values():
        if ":" in slot["name"]:
            raise ConfigError(
                f"policy '{slot['name']}' names a module; over HTTP only installed policies can be named: "
                "put the strategy into the configuration"
            )
