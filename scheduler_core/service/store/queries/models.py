"""Trained models: which there are, which serve, which wait to be judged; trainings; what is watched."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from kairos.scheduler_core.errors import ConflictError, UnknownNameError
from kairos.scheduler_core.service.store.changes import announce
from kairos.scheduler_core.service.store.queries.events import add_event
from kairos.scheduler_core.service.store.queries.numbering import next_number, version_id
from kairos.scheduler_core.service.store.tables import Batch, Model, Promotion, Step, Training, Watch

# -- models ----------------------------------------------------------------------------------------------------------


class ModelRow(NamedTuple):
    """A model without its bytes."""

    profile_id: str
    version: int
    schema_hash: str
    trained_at: datetime
    last_step: int
    state: str
    report: dict[str, Any] | None


_MODEL = (
    *(Model.profile_id, Model.version, Model.schema_hash, Model.trained_at, Model.last_step),
    *(Model.state, Model.report),
)


class ServingModel(NamedTuple):
    """The model that serves a profile."""

    version: int
    generation: int
    """Of the promotion; of two, the higher one holds."""
    schema_hash: str
    trained_at: datetime


def add_model(
    connection: Connection,
    profile_id: str,
    schema_hash: str,
    last_step: int,
    artifact: bytes,
    report: Mapping[str, Any] | None = None,
    state: str = "judged",
) -> int:
    """Keep a trained model; it serves once promoted. Its version within the profile.

    A challenger takes the place of one that the gate has not looked at yet.
    """
    version = next_number(connection, Model.version, Model.profile_id == profile_id)
    if state == "challenger":
        waiting = (Model.profile_id == profile_id) & (Model.state == "challenger")
        connection.execute(update(Model).where(waiting).values(state="superseded"))
    values = {"schema_hash": schema_hash, "last_step": last_step, "artifact": artifact, "trained_at": datetime.now(UTC)}
    connection.execute(
        insert(Model).values(profile_id=profile_id, version=version, report=report, state=state, **values)
    )
    return version


def models(connection: Connection, *, state: str | None = None) -> list[ModelRow]:
    """All of them, or those in a state; by profile and version."""
    wanted = select(*_MODEL).order_by(Model.profile_id, Model.version)
    if state is not None:
        wanted = wanted.where(Model.state == state)
    return [ModelRow(*row) for row in connection.execute(wanted)]


def model(connection: Connection, profile_id: str, version: int) -> ModelRow:
    """One of them.

    Raises:
        UnknownNameError: there is no such version.
    """
    row_id = _model_id(connection, profile_id, version)
    return ModelRow(*connection.execute(select(*_MODEL).where(Model.id == row_id)).one())


def judge_model(connection: Connection, profile_id: str, version: int, state: str, report: Mapping[str, Any]) -> None:
    """Keep what the gate said."""
    named = (Model.profile_id == profile_id) & (Model.version == version)
    connection.execute(update(Model).where(named).values(state=state, report=report))


def model_artifact(connection: Connection, profile_id: str, version: int) -> bytes:
    """The bytes of a model, as `predictors.artifact` writes them.

    Raises:
        UnknownNameError: there is no such version.
    """
    row_id = _model_id(connection, profile_id, version)
    return connection.scalars(select(Model.artifact).where(Model.id == row_id)).one()


def _model_id(connection: Connection, profile_id: str, version: int) -> int:
    return version_id(connection, "model", Model, Model.profile_id == profile_id, profile_id, version)


# -- which serves ----------------------------------------------------------------------------------------------------


def promote_model(
    connection: Connection, profile_id: str, version: int | None, reason: str, *, rollback: bool = False
) -> int:
    """Let a version serve its profile from now on, or with None the step times of the configuration; the generation.

    Raises:
        UnknownNameError: there is no such version.
    """
    row_id = None if version is None else _model_id(connection, profile_id, version)
    generation = next_number(connection, Promotion.generation)
    values = {"profile_id": profile_id, "model": row_id, "promoted_at": datetime.now(UTC), "reason": reason}
    connection.execute(insert(Promotion).values(generation=generation, rollback=rollback, **values))
    detail = {"version": version, "generation": generation, "reason": reason}
    add_event(connection, "model_rolled_back" if rollback else "model_promoted", profile_id, detail)
    announce(connection, "models")
    return generation


def serving_models(connection: Connection) -> dict[str, ServingModel]:
    """By profile id, the model that serves it; profiles that the configuration serves are not in it."""
    latest = select(func.max(Promotion.generation)).group_by(Promotion.profile_id)
    found = connection.execute(
        select(Promotion.profile_id, Model.version, Promotion.generation, Model.schema_hash, Model.trained_at)
        .join(Model, Model.id == Promotion.model)
        .where(Promotion.generation.in_(latest))
    )
    return {row[0]: ServingModel(*row[1:]) for row in found}


def generation(connection: Connection) -> int:
    """Of the latest promotion of any profile; 0: there was none."""
    return connection.scalar(select(func.max(Promotion.generation))) or 0


class LastPromotion(NamedTuple):
    """How a profile came to what serves it."""

    rollback: bool
    before: int | None
    """The version that served before what serves now first did; None: the configuration's step times."""


def last_promotion(connection: Connection, profile_id: str) -> LastPromotion:
    """Of a profile.

    Raises:
        ConflictError: nothing was ever promoted for it.
    """
    history = connection.execute(
        select(Promotion.rollback, Promotion.model, Model.version)
        .outerjoin(Model, Model.id == Promotion.model)
        .where(Promotion.profile_id == profile_id)
        .order_by(Promotion.generation)
    ).all()
    if not history:
        raise ConflictError(f"no model was ever promoted for the profile '{profile_id}', so none can be rolled back")
    serving = history[-1]
    first = next(place for place, row in enumerate(history) if row.model == serving.model)
    return LastPromotion(serving.rollback, history[first - 1].version if first else None)


def roll_back(connection: Connection, profile_id: str, reason: str) -> int | None:
    """Let the version serve again that served before; None: the step times of the configuration do now.

    Raises:
        ConflictError: nothing is promoted for this profile that could be taken back.
    """
    before = last_promotion(connection, profile_id).before
    if profile_id not in serving_models(connection):
        raise ConflictError(f"the step times of the configuration serve the profile '{profile_id}': nothing is left")
    promote_model(connection, profile_id, before, reason, rollback=True)
    return before


# -- trainings -------------------------------------------------------------------------------------------------------


class TrainingRow(NamedTuple):
    """A training."""

    id: int
    cause: str
    profiles: list[str] | None
    state: str
    attempts: int
    asked_at: datetime
    ended_at: datetime | None
    models: list[str] | None
    error: str | None


_TRAINING = (
    *(Training.id, Training.cause, Training.profiles, Training.state, Training.attempts, Training.asked_at),
    *(Training.ended_at, Training.models, Training.error),
)
MOST_ATTEMPTS = 3
"""A training whose process died is begun again, up to so many times in all."""


def ask_training(connection: Connection, cause: str, profiles: Sequence[str] | None) -> TrainingRow:
    """Have a training done, unless the same waits already; that one then."""
    for waiting in trainings(connection, 100, state="waiting"):
        if waiting.profiles is None or (profiles is not None and set(profiles) <= set(waiting.profiles)):
            return waiting
    values = {"cause": cause, "profiles": None if profiles is None else list(profiles), "asked_at": datetime.now(UTC)}
    made = insert(Training).values(state="waiting", attempts=0, **values).returning(*_TRAINING)
    return TrainingRow(*connection.execute(made).one())


def trainings(connection: Connection, most: int, *, state: str | None = None) -> list[TrainingRow]:
    """The latest first, all or those in a state."""
    wanted = select(*_TRAINING).order_by(Training.id.desc()).limit(most)
    if state is not None:
        wanted = wanted.where(Training.state == state)
    return [TrainingRow(*row) for row in connection.execute(wanted)]


def training(connection: Connection, training_id: int) -> TrainingRow:
    """One of them.

    Raises:
        UnknownNameError: there is none of this number.
    """
    row = connection.execute(select(*_TRAINING).where(Training.id == training_id)).first()
    if row is None:
        raise UnknownNameError("training", str(training_id), ())
    return TrainingRow(*row)


def begin_training(connection: Connection) -> TrainingRow | None:
    """The oldest that waits; it runs now."""
    oldest = select(func.min(Training.id)).where(Training.state == "waiting").scalar_subquery()
    values = {"state": "running", "attempts": Training.attempts + 1}
    row = connection.execute(update(Training).where(Training.id == oldest).values(values).returning(*_TRAINING)).first()
    return None if row is None else TrainingRow(*row)


def end_training(
    connection: Connection, training_id: int, *, made: Sequence[str] = (), error: str | None = None
) -> None:
    """It is done, or has failed with an error."""
    state = "done" if error is None else "failed"
    values = {"state": state, "ended_at": datetime.now(UTC), "models": list(made), "error": error and error[:1024]}
    connection.execute(update(Training).where(Training.id == training_id).values(values))
    add_event(connection, "training_ended", str(training_id), {"outcome": state, "models": list(made), "error": error})


def take_up_trainings(connection: Connection) -> None:
    """Have those done again whose process ended before they did; one that this happens to again and again has failed.

    To be called by the holder of the trainer's lease, before it begins.
    """
    for row in trainings(connection, 100, state="running"):
        if row.attempts >= MOST_ATTEMPTS:
            end_training(connection, row.id, error=f"its process ended early {row.attempts} times")
        else:
            connection.execute(update(Training).where(Training.id == row.id).values(state="waiting"))
            add_event(connection, "training_interrupted", str(row.id), {"attempts": row.attempts})


def last_training_at(connection: Connection) -> datetime | None:
    """When the latest training was asked for; before the first, when the first steps came. None: nothing came yet."""
    asked: datetime | None = connection.scalar(select(func.max(Training.asked_at)))
    if asked is None:
        asked = connection.scalar(select(func.min(Batch.received_at)).where(Batch.rows_of == "steps"))
    return asked


# -- watches ---------------------------------------------------------------------------------------------------------


class WatchRow(NamedTuple):
    """What is watched of a profile and kind."""

    profile_id: str
    kind: str
    last_step: int
    state: bytes


class CorrectionRow(NamedTuple):
    """What is served with the predictions of a profile and kind."""

    profile_id: str
    kind: str
    correction: dict[str, Any]


def watches(connection: Connection) -> list[WatchRow]:
    """All of them."""
    columns = (Watch.profile_id, Watch.kind, Watch.last_step, Watch.state)
    return [WatchRow(*row) for row in connection.execute(select(*columns))]


def corrections(connection: Connection) -> list[CorrectionRow]:
    """All of them."""
    columns = (Watch.profile_id, Watch.kind, Watch.correction)
    return [CorrectionRow(*row) for row in connection.execute(select(*columns))]


def write_watches(
    connection: Connection, last_step: int, changed: Mapping[tuple[str, str], tuple[dict[str, Any], bytes]]
) -> None:
    """Keep (correction, state) of what changed; every watch has seen all steps up to `last_step` now."""
    connection.execute(update(Watch).values(last_step=last_step))
    for (profile_id, kind), (correction, state) in changed.items():
        connection.execute(delete(Watch).where(Watch.profile_id == profile_id, Watch.kind == kind))
        values = {"profile_id": profile_id, "kind": kind, "last_step": last_step}
        connection.execute(insert(Watch).values(correction=correction, state=state, **values))
    announce(connection, "models")


def watched_step(connection: Connection) -> int:
    """The last step that the watches have seen."""
    return connection.scalar(select(func.max(Watch.last_step))) or 0


def last_step(connection: Connection) -> int:
    """The highest id of a step."""
    return connection.scalar(select(func.max(Step.id))) or 0


def work_waits(connection: Connection) -> bool:
    """Whether a training waits or runs, or steps came that no watch has seen."""
    open_training = exists().where(Training.state.in_(("waiting", "running")))
    return bool(connection.scalar(select(open_training))) or last_step(connection) not in (0, watched_step(connection))
