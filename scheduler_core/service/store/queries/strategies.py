"""Strategies: their versions, and which is active."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, select

from kairos.scheduler_core.service.store.queries.numbering import next_number, version_id
from kairos.scheduler_core.service.store.tables import Activation, Strategy


class StrategyVersion(NamedTuple):
    """A version of a strategy, as it was kept."""

    name: str
    version: int
    policies: dict[str, Any]
    created_at: datetime


class ActiveStrategy(NamedTuple):
    """The strategy in use."""

    name: str
    version: int
    generation: int
    """Rises with every change; of two, the higher one holds."""
    policies: dict[str, Any]


def add_strategy(connection: Connection, name: str, policies: dict[str, Any]) -> int:
    """Keep a version of a strategy, as the configuration writes it; it is used once activated. Its version.

    Where the newest version is the same, it is that one.
    """
    version = next_number(connection, Strategy.version, Strategy.name == name)
    newest = select(Strategy.policies).where(Strategy.name == name, Strategy.version == version - 1)
    if connection.scalar(newest) == policies:
        return version - 1
    connection.execute(
        insert(Strategy).values(name=name, version=version, policies=policies, created_at=datetime.now(UTC))
    )
    return version


def seed_strategies(connection: Connection, configured: Mapping[str, dict[str, Any]], active: str) -> None:
    """Keep each strategy of a configuration that no version holds; the first time, use the one it calls active."""
    kept = {(row.name, str(row.policies)): row.version for row in strategy_versions(connection)}
    versions = {
        name: kept.get((name, str(policies))) or add_strategy(connection, name, policies)
        for name, policies in configured.items()
    }
    if active_strategy(connection) is None:
        activate_strategy(connection, active, versions[active])


def strategy_versions(connection: Connection) -> list[StrategyVersion]:
    """All of them, oldest first."""
    columns = (Strategy.name, Strategy.version, Strategy.policies, Strategy.created_at)
    return [StrategyVersion(*row) for row in connection.execute(select(*columns).order_by(Strategy.id))]


def activate_strategy(connection: Connection, name: str, version: int) -> int:
    """Use a version from now on; the generation. A rollback is the activation of an older one.

    Raises:
        UnknownNameError: there is no such version.
    """
    strategy = version_id(connection, "strategy", Strategy, Strategy.name == name, name, version)
    generation = next_number(connection, Activation.generation)
    connection.execute(
        insert(Activation).values(generation=generation, strategy=strategy, activated_at=datetime.now(UTC))
    )
    return generation


def active_strategy(connection: Connection) -> ActiveStrategy | None:
    """The one of the highest generation; None: none was ever activated."""
    row = connection.execute(
        select(Strategy.name, Strategy.version, Activation.generation, Strategy.policies)
        .join(Activation, Activation.strategy == Strategy.id)
        .order_by(Activation.generation.desc())
        .limit(1)
    ).first()
    return None if row is None else ActiveStrategy(*row)


def earlier_strategy(connection: Connection) -> tuple[str, int] | None:
    """Name and version of what was active before the strategy in use; None: nothing else was."""
    in_use = select(Activation.strategy).order_by(Activation.generation.desc()).limit(1).scalar_subquery()
    row = connection.execute(
        select(Strategy.name, Strategy.version)
        .join(Activation, Activation.strategy == Strategy.id)
        .where(Activation.strategy != in_use)
        .order_by(Activation.generation.desc())
        .limit(1)
    ).first()
    return None if row is None else (row.name, row.version)


def strategies_state(connection: Connection) -> tuple[int, int]:
    """(versions, generation): two numbers that rise with every change."""
    versions, generation = (connection.scalar(select(func.max(c))) for c in (Strategy.id, Activation.generation))
    return versions or 0, generation or 0
