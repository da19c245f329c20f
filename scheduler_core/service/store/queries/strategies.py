"""Strategies: their versions, and which is active."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select

from kairos.scheduler_core.service.store.queries.numbering import next_number, version_id
from kairos.scheduler_core.service.store.tables import Activation, Strategy


class ActiveStrategy(NamedTuple):
    """The strategy in use."""

    name: str
    version: int
    generation: int
    """Rises with every change; of two, the higher one holds."""
    policies: dict[str, Any]


def add_strategy(connection: Connection, name: str, policies: dict[str, Any]) -> int:
    """Keep a version of a strategy, as the configuration writes it; it is used once activated. Its version."""
    version = next_number(connection, Strategy.version, Strategy.name == name)
    connection.execute(
        insert(Strategy).values(name=name, version=version, policies=policies, created_at=datetime.now(UTC))
    )
    return version


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
