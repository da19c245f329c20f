"""The control plane as a FastAPI application: routes, the errors' one shape, and its OpenAPI document."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import kairos
from kairos.scheduler_core.config import Settings, StoreSettings
from kairos.scheduler_core.errors import KairosError
from kairos.scheduler_core.replay import Replay
from kairos.scheduler_core.service.access import Access, Keys
from kairos.scheduler_core.service.attainment import Outcomes
from kairos.scheduler_core.service.bodies import Limits
from kairos.scheduler_core.service.decisions.part import Decisions
from kairos.scheduler_core.service.expiry import Expiry
from kairos.scheduler_core.service.lifecycle import Lifecycle
from kairos.scheduler_core.service.live import Live
from kairos.scheduler_core.service.managed.part import Managed
from kairos.scheduler_core.service.models.part import ModelsPart
from kairos.scheduler_core.service.openapi import openapi_of
from kairos.scheduler_core.service.plane import Database, Part, Plane
from kairos.scheduler_core.service.problems import on_bug, on_http_error, on_kairos_error, on_unfit_request
from kairos.scheduler_core.service.routes.events import events_router
from kairos.scheduler_core.service.routes.overview import overview_router
from kairos.scheduler_core.service.routes.schedule import schedule_route
from kairos.scheduler_core.service.routes.telemetry import telemetry_routes
from kairos.scheduler_core.service.schedule import Scheduler, strategies_of
from kairos.scheduler_core.service.store.changes import Changes
from kairos.scheduler_core.service.store.revisions import require_served
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer


def create_app(settings: Settings, replay: Replay | None = None) -> FastAPI:
    """The application over one configuration; models and policies are loaded here.

    Args:
        replay: runs the champion of an experiment on recorded arrivals.

    Raises:
        ConfigError, UnknownPolicyError, SchemaError: a strategy or a model of the configuration cannot be loaded.
        StoreError: the database is away, or not at a revision that this Kairos runs on.
    """
    scheduler = Scheduler(settings, strategies_of(settings))
    plane = Plane(settings, scheduler, _opened(settings.store), replay=replay)
    database = plane.database
    keys = Keys(settings.access, database.store if database else None)
    if database:
        database.changes.watch("keys", keys.look)
        plane.metrics.database_up.set_function(lambda: not database.changes.away)
    scheduler.watchers += (plane.metrics.note_decision,)
    outcomes = Outcomes(plane.metrics, lambda: scheduler.settings.slo.classes)
    parts = _parts(plane, outcomes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(_start, plane, parts)
        yield
        await to_thread.run_sync(_stop, plane, parts)

    app = FastAPI(
        title="Kairos",
        version=kairos.__version__,
        summary="Which request runs next, where, in which batch.",
        lifespan=lifespan,
    )
    app.router.routes.append(schedule_route(scheduler.schedule))
    if database:
        telemetry = telemetry_routes(database.writer, plane.metrics, settings.service.max_body_bytes, outcomes.note)
        app.router.routes.extend(telemetry)
        app.include_router(events_router(database.store), tags=["overview"])
    app.include_router(overview_router(plane), tags=["overview"])
    for part in parts:
        app.router.routes.extend(part.routes())
    app.add_exception_handler(KairosError, on_kairos_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_unfit_request)
    app.add_exception_handler(Exception, on_bug)
    app.add_middleware(Limits, most_bytes=settings.service.max_body_bytes, most_s=settings.service.client_timeout_s)
    app.add_middleware(Access, keys=keys, metrics=plane.metrics)  # the last one is the first to see a request
    if settings.tracing.otlp_endpoint:
        parts.insert(0, _traced(app, plane, settings.tracing.otlp_endpoint))
    app.state.lifecycle = Lifecycle(plane, keys)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(openapi_of(app, telemetry=database is not None))
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def _parts(plane: Plane, outcomes: Outcomes) -> list[Part]:
    """Everything beside `/schedule` and telemetry, in the order in which it starts."""
    parts: list[Part] = [Live(plane)]
    if plane.database:
        parts.append(ModelsPart(plane, plane.database))
    if plane.database and plane.settings.store:
        parts.append(Expiry(plane.database.store, plane.settings.store.retention, plane.metrics))
    if plane.database:
        decisions = Decisions(plane, plane.database)
        parts += [decisions, Managed(plane, plane.database, decisions.recorder, outcomes.note)]
    return parts


def _traced(app: FastAPI, plane: Plane, endpoint: str) -> Part:
    """Have every request traced; what exports the spans."""
    from kairos.scheduler_core.service.tracing import Exporter, Tracing, note_decision

    exporter = Exporter(endpoint, plane.metrics)
    plane.state.lost.append(exporter.lost)
    plane.scheduler.watchers += (note_decision,)
    app.add_middleware(Tracing, exporter=exporter)
    return exporter


def _start(plane: Plane, parts: Sequence[Part]) -> None:
    for part in parts:
        part.start()
    if plane.database:
        plane.database.changes.start()


def _stop(plane: Plane, parts: Sequence[Part]) -> None:
    if plane.database:
        plane.database.changes.stop()
    for part in reversed(parts):
        part.stop()
    if plane.database:
        plane.database.writer.drain()
        plane.database.store.close()


def _opened(settings: StoreSettings | None) -> Database | None:
    """The database of the configuration, in the form that this Kairos needs."""
    if settings is None:
        return None
    store = Store(settings.url.get_secret_value())
    require_served(store)
    return Database(store, Writer(store, settings.queued_rows), Changes(store))
