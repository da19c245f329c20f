"""Models as the store keeps them: one profile a row, whole in its bytes."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from kairos.predictors.artifact import ProfileModels, dump, parse
from kairos.predictors.features import SCHEMA_HASH
from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.store.queries.models import add_model
from kairos.scheduler_core.telemetry import StepKind


def add_challenger(connection: Connection, learned: ProfileModels, last_step: int) -> str:
    """Keep a model for the gate to look at, by steps after `last_step`; its id."""
    profile_id = learned.profile.profile_id
    sources = {kind: model.source for kind, model in learned.models.items()}
    report = {"waiting": list(learned.models), "sources": sources}
    version = add_model(connection, profile_id, SCHEMA_HASH, last_step, dump([learned]), report, state="challenger")
    return f"{profile_id}@{version}"


def read_model(
    content: bytes, model_id: str, report: Mapping[str, Any] | None
) -> tuple[ProfileModels, dict[StepKind, int]]:
    """The one profile in the bytes of a stored model, and the origins of its kinds.

    Raises:
        InputError: they are damaged, or hold another profile.
        SchemaError: it was trained on other features.
    """
    profile_id, _, version = model_id.rpartition("@")
    learned = parse(content, model_id).learned.get(profile_id)
    if learned is None:
        raise InputError(f"the model {model_id} holds no such profile; roll back or train again")
    kinds = (report or {}).get("kinds", {})
    return learned, {kind: kinds.get(kind, int(version)) for kind in learned.models}
