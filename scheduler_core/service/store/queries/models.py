"""Trained models: which there are, and which serve."""

from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, insert, select

from kairos.scheduler_core.service.store.queries.numbering import next_number, version_id
from kairos.scheduler_core.service.store.tables import Model, Promotion


class ServingModel(NamedTuple):
    """The model that serves a profile."""

    version: int
    generation: int
    """Of the promotion; of two, the higher one holds."""
    schema_hash: str
    trained_at: datetime


def add_model(connection: Connection, profile_id: str, schema_hash: str, last_step: int, artifact: bytes) -> int:
    """Keep a trained model; it serves once promoted. Its version within the profile."""
    version = next_number(connection, Model.version, Model.profile_id == profile_id)
    values = {"schema_hash": schema_hash, "last_step": last_step, "artifact": artifact, "trained_at": datetime.now(UTC)}
    connection.execute(insert(Model).values(profile_id=profile_id, version=version, **values))
    return version


def promote_model(connection: Connection, profile_id: str, version: int, reason: str) -> int:
    """Let a version serve its profile, from now on; the generation. A rollback is the promotion of an older one.

    Raises:
        UnknownNameError: there is no such version.
    """
    model = version_id(connection, "model", Model, Model.profile_id == profile_id, profile_id, version)
    generation = next_number(connection, Promotion.generation)
    values = {"profile_id": profile_id, "model": model, "promoted_at": datetime.now(UTC), "reason": reason}
    connection.execute(insert(Promotion).values(generation=generation, **values))
    return generation


def serving_models(connection: Connection) -> dict[str, ServingModel]:
    """By profile id, the model that serves it."""
    latest = select(func.max(Promotion.generation)).group_by(Promotion.profile_id)
    found = connection.execute(
        select(Promotion.profile_id, Model.version, Promotion.generation, Model.schema_hash, Model.trained_at)
        .join(Model, Model.id == Promotion.model)
        .where(Promotion.generation.in_(latest))
    )
    return {row[0]: ServingModel(*row[1:]) for row in found}


def model_artifact(connection: Connection, profile_id: str, version: int) -> bytes:
    """The bytes of a model, as `predictors.artifact` writes them.

    Raises:
        UnknownNameError: there is no such version.
    """
    model = version_id(connection, "model", Model, Model.profile_id == profile_id, profile_id, version)
    return connection.scalars(select(Model.artifact).where(Model.id == model)).one()
