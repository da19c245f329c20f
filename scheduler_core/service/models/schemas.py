"""Bodies of the routes for models."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from kairos.scheduler_core.service.store.queries.models import TrainingRow
from kairos.scheduler_core.telemetry import StepKind

ProfileId = Annotated[str, Field(min_length=1, max_length=1600, pattern=r"^[a-z0-9_.-]+$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TrainBody(_Body):
    """Which models to train."""

    profiles: Annotated[list[ProfileId], Field(min_length=1, max_length=1000)] | None = None
    """Profile ids; left out: all that have telemetry."""


class TrainingShown(BaseModel):
    """A training, and what became of it."""

    id: int
    cause: str
    """request, schedule, rows or drift."""
    profiles: list[str] | None
    """Null: all that have telemetry."""
    state: str
    """waiting, running, done or failed."""
    attempts: int
    asked_at: datetime
    ended_at: datetime | None
    models: list[str] | None
    """Ids of what it made."""
    error: str | None

    @staticmethod
    def of(row: TrainingRow) -> "TrainingShown":
        """Of a row of the store."""
        return TrainingShown(**row._asdict())


class ModelShown(BaseModel):
    """A model."""

    id: str
    """profile_id@version."""
    profile_id: str
    version: int
    state: str
    """challenger: the gate has still to look; judged; superseded: by a newer challenger before that."""
    serving: bool
    trained_at: datetime
    age_s: float
    last_step: int
    """Id of the last step that it learned from."""
    schema_hash: str
    report: dict[str, JsonValue]
    """How it was made, and what the gate said of it by kind of step."""


class Models(BaseModel):
    """All models, and the latest trainings."""

    models: list[ModelShown]
    trainings: list[TrainingShown]


class IntervalShown(BaseModel):
    """Factors of the 10 % and the 90 % quantile on the median."""

    lower: float
    upper: float


class CorrectionShown(BaseModel):
    """What is multiplied to the answers of one kind's model."""

    median: float
    load: tuple[float, float]
    """Between the load terciles: batch size of a decode step, tokens of another."""
    intervals: tuple[IntervalShown, IntervalShown, IntervalShown]


class ServedShown(BaseModel):
    """A model that serves."""

    id: str
    profile_id: str
    version: int
    trained_at: datetime
    age_s: float
    """Of the last good fit."""
    corrections: dict[StepKind, CorrectionShown]


class ServingShown(BaseModel):
    """What serves, for those who predict by themselves."""

    models: list[ServedShown]
    troubles: list[str]
    """Promoted models that cannot be read; the ones before them serve."""


class Uploaded(BaseModel):
    """What an artifact was kept as."""

    models: list[str]
    """Ids, one a profile; each is a challenger now."""


class PromoteBody(_Body):
    """Why a model is promoted."""

    reason: Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f]*$")] = "by hand"


class RollbackBody(_Body):
    """What is rolled back."""

    profile_id: ProfileId
    reason: Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f]*$")] = "by hand"


class Promoted(BaseModel):
    """What serves a profile now."""

    profile_id: str
    serving: str | None
    """The model's id; null: the step times of the configuration."""


class StepQuery(_Body):
    """A step by its sums."""

    profile: Annotated[str, Field(min_length=1, max_length=1600)]
    """Name or id of a profile."""
    n_requests: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Prompts, in a step with new tokens."""
    new_tokens: Annotated[int, Field(ge=0, le=10**8)] = 0
    cached_tokens: Annotated[int, Field(ge=0, le=10**12)] = 0
    batch_size: Annotated[int, Field(ge=0, le=10**6)] = 0
    sum_context_tokens: Annotated[int, Field(ge=0, le=10**12)] = 0


class PredictBody(_Body):
    """Steps to predict."""

    steps: Annotated[list[StepQuery], Field(min_length=1, max_length=10_000)]


class StepPredicted(BaseModel):
    """How long a step will take."""

    kind: StepKind
    lower_s: float
    """The 10 % quantile."""
    median_s: float
    upper_s: float
    """The 90 % quantile."""
    model_version: str
    source: str
    """What the numbers rest on."""


class PredictAnswer(BaseModel):
    """In the order of the steps."""

    steps: list[StepPredicted]
