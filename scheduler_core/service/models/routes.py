"""Routes of the model lifecycle, and `POST /predict`."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from kairos.predictors.artifact import parse
from kairos.predictors.checks import check_predictor
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import FieldsError, InputError
from kairos.scheduler_core.service.bodies import unreadable
from kairos.scheduler_core.service.models.artifacts import add_challenger, read_model
from kairos.scheduler_core.service.models.book import Book
from kairos.scheduler_core.service.models.schemas import (
    CorrectionShown,
    Models,
    ModelShown,
    PredictAnswer,
    PredictBody,
    PromoteBody,
    Promoted,
    RollbackBody,
    ServedShown,
    ServingShown,
    StepPredicted,
    StepQuery,
    TrainBody,
    TrainingShown,
    Uploaded,
)
from kairos.scheduler_core.service.problems import problem_response, problem_responses
from kairos.scheduler_core.service.store.queries import models as queries
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.telemetry import StepKind

ARTIFACT_TYPE = "application/octet-stream"
_LATEST = 20
"""Trainings that a list shows."""

ModelId = Annotated[
    str, Path(max_length=1700, pattern=r"^[a-z0-9_.-]+@[1-9][0-9]{0,8}$", description="profile_id@version")
]
ProfilePath = Annotated[str, Path(max_length=1600, pattern=r"^[a-z0-9_.-]+$")]
Version = Annotated[int, Path(ge=1, le=10**9)]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


def model_routes(book: Book, store: Store, settings: Settings, seen: Callable[[], None]) -> Sequence[BaseRoute]:
    """The routes over one book and its store; `seen` has the book look at once."""
    router = APIRouter(tags=["models"])
    lifecycle_routes(router, book, store, seen)

    @router.post("/models", status_code=201, openapi_extra=_ARTIFACT_BODY, responses=_UPLOAD)
    async def upload(request: Request) -> Uploaded:
        """Keep a model that `kairos train` made; later steps judge it. The body is the model's file."""
        if refusal := unreadable(request.headers, (ARTIFACT_TYPE,), ("identity",)):
            return problem_response(refusal)  # type: ignore[return-value]  # FastAPI passes a response on
        return await to_thread.run_sync(_keep, store, await request.body())

    @router.post("/predict", responses=problem_responses(s404="There is no such profile."))
    def predict(body: PredictBody) -> PredictAnswer:
        """Say how long steps will take, with calibrated quantiles."""
        serving = book.serving
        named = {name: profile.as_profile() for name, profile in settings.profiles.items()}
        answers = []
        for place, step in enumerate(body.steps):
            profile = named.get(step.profile) or serving.profile(step.profile)
            answers.append(_predicted(book, place, step, profile))
        return PredictAnswer(steps=answers)

    return router.routes


def lifecycle_routes(router: APIRouter, book: Book, store: Store, seen: Callable[[], None]) -> None:
    """Add what lists, trains, promotes and rolls back."""

    @router.get("/models", responses=_AWAY)
    def models() -> Models:
        """List the models, what the gate said of them, and the latest trainings."""
        with store.read() as connection:
            rows = queries.models(connection)
            serving = {profile_id: row.version for profile_id, row in queries.serving_models(connection).items()}
            trainings = queries.trainings(connection, _LATEST)
        return Models(
            models=[_shown(row, serving.get(row.profile_id) == row.version) for row in rows],
            trainings=[TrainingShown.of(row) for row in trainings],
        )

    @router.get("/models/serving")
    def serving() -> ServingShown:
        """List what serves here, with its corrections: all that a data plane needs beside the artifacts."""
        now = book.serving
        return ServingShown(
            models=[
                ServedShown(
                    id=entry.model_id,
                    profile_id=profile_id,
                    version=entry.version,
                    trained_at=entry.trained_at,
                    age_s=_age_s(entry.trained_at),
                    corrections={
                        kind: CorrectionShown.model_validate(correction, from_attributes=True)
                        for kind, correction in now.corrections(profile_id).items()
                    },
                )
                for profile_id, entry in now.served.items()
            ],
            troubles=list(now.troubles),
        )

    @router.get(
        "/models/{profile_id}/{version}/artifact", response_class=Response, responses=_ARTIFACT_ANSWER | _NO_MODEL
    )
    def artifact(profile_id: ProfilePath, version: Version) -> Response:
        """Give the bytes of a model, as `kairos train --out` writes them."""
        with store.read() as connection:
            content = queries.model_artifact(connection, profile_id, version)
        return Response(content, media_type=ARTIFACT_TYPE)

    @router.post("/models/train", status_code=202, responses=_AWAY)
    def train(body: TrainBody = TrainBody()) -> TrainingShown:
        """Ask for a training; one replica does it, in a process of its own."""
        with store.write() as connection:
            return TrainingShown.of(queries.ask_training(connection, "request", body.profiles))

    @router.get("/models/trainings/{number}", responses=_AWAY | problem_responses(s404="There is no such training."))
    def training(number: Number) -> TrainingShown:
        """Say what became of a training."""
        with store.read() as connection:
            return TrainingShown.of(queries.training(connection, number))

    @router.post("/models/{model_id}/promote", responses=_PROMOTE)
    def promote(model_id: ModelId, body: PromoteBody = PromoteBody()) -> Promoted:
        """Let a model serve its profile, whatever the gate says of it. One that cannot be read is refused."""
        profile_id, version = model_id.rsplit("@", 1)
        with store.write() as connection:
            report = queries.model(connection, profile_id, int(version)).report or {}
            read_model(queries.model_artifact(connection, profile_id, int(version)), model_id, report)
            queries.judge_model(connection, profile_id, int(version), "judged", report | {"waiting": []})
            queries.promote_model(connection, profile_id, int(version), body.reason)
        seen()
        return Promoted(profile_id=profile_id, serving=model_id)

    @router.post("/models/rollback", responses=_ROLL_BACK)
    def rollback(body: RollbackBody) -> Promoted:
        """Let the model serve again that served before; before the first one, the configuration's step times."""
        with store.write() as connection:
            version = queries.roll_back(connection, body.profile_id, body.reason)
        seen()
        serving = None if version is None else f"{body.profile_id}@{version}"
        return Promoted(profile_id=body.profile_id, serving=serving)


def _keep(store: Store, content: bytes) -> Uploaded:
    """Every profile of an artifact as a challenger, all or none."""
    predictors = parse(content, "in the body")
    for profile_id in predictors.profile_ids:
        try:
            check_predictor(predictors.profile(profile_id))
        except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"the model of {profile_id} is none to predict with ({type(error).__name__}: {error}); train it again"
            ) from None
    made = []
    with store.write() as connection:
        last_step = queries.last_step(connection)
        for _, learned in sorted(predictors.learned.items()):
            made.append(add_challenger(connection, learned, last_step))
    return Uploaded(models=made)


def _predicted(book: Book, place: int, step: StepQuery, profile: Profile) -> StepPredicted:
    if not step.new_tokens and not step.batch_size:
        raise FieldsError([(f"steps[{place}]", "needs new_tokens (prefill), batch_size (decode) or both")])
    kind: StepKind = "decode" if not step.new_tokens else "mixed" if step.batch_size else "prefill"
    predictor = book.serving.predictor(profile)
    sums = step.model_dump(exclude={"profile"}) | ({} if step.new_tokens else {"n_requests": 0, "cached_tokens": 0})
    lower_s, median_s, upper_s = (float(quantile[0]) for quantile in predictor.predict_step(**sums))
    served = book.serving.served.get(profile.profile_id)
    return StepPredicted(
        kind=kind,
        lower_s=lower_s,
        median_s=median_s,
        upper_s=upper_s,
        model_version=served.model_id if served else book.version_of(step.profile),
        source=predictor.models[kind].source,
    )


def _shown(row: queries.ModelRow, serving: bool) -> ModelShown:
    return ModelShown(
        **row._asdict() | {"report": row.report or {}},
        id=f"{row.profile_id}@{row.version}",
        serving=serving,
        age_s=_age_s(row.trained_at),
    )


def _age_s(trained_at: datetime) -> float:
    return time.time() - trained_at.timestamp()


_AWAY = problem_responses(s503="The database cannot be used now; nothing was changed.")
_NO_MODEL = _AWAY | problem_responses(s404="There is no such model.")
_OTHER_SCHEMA = problem_responses(s409="It was trained on other features than this Kairos makes.")
_UPLOAD = (
    _AWAY
    | _OTHER_SCHEMA
    | problem_responses(s415="The body is of another type.", s422="It is no model, or none to predict with.")
)
_PROMOTE = _NO_MODEL | _OTHER_SCHEMA
_ROLL_BACK = _AWAY | problem_responses(s409="Nothing is promoted for this profile that could be taken back.")
_ARTIFACT_BODY = {
    "requestBody": {
        "required": True,
        "content": {ARTIFACT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_ARTIFACT_ANSWER: dict[int | str, dict[str, object]] = {
    200: {"content": {ARTIFACT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}
