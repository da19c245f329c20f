"""The control plane as a FastAPI application: routes, the errors' one shape, and its OpenAPI document."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from starlette.exceptions import HTTPException

import kairos
from kairos.scheduler_core.config import Settings, StoreSettings, is_loopback
from kairos.scheduler_core.errors import ConfigError, KairosError
from kairos.scheduler_core.service.openapi import openapi_of
from kairos.scheduler_core.service.problems import on_bug, on_http_error, on_kairos_error
from kairos.scheduler_core.service.routes.overview import overview_router
from kairos.scheduler_core.service.routes.schedule import schedule_route
from kairos.scheduler_core.service.routes.telemetry import telemetry_routes
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.store.revisions import require_served
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer


def create_app(settings: Settings) -> FastAPI:
    """The application over one configuration; models and policies are loaded here.

    Raises:
        ConfigError, UnknownPolicyError, SchemaError: a strategy or a model of the configuration cannot be loaded.
        StoreError: the database is away, or not at a revision that this Kairos runs on.
    """
    strategies = {name: choice.as_strategy(name).check() for name, choice in settings.strategies.items()}
    scheduler = Scheduler(settings, strategies)
    store, writer = _opened(settings.store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if store and writer:
            await to_thread.run_sync(writer.drain)
            store.close()

    app = FastAPI(
        title="Kairos",
        version=kairos.__version__,
        summary="Which request runs next, where, in which batch.",
        lifespan=lifespan,
    )
    app.router.routes.append(schedule_route(scheduler.schedule, settings.service.max_body_bytes))
    if writer:
        app.router.routes.extend(telemetry_routes(writer, settings.service.max_body_bytes))
    app.include_router(overview_router(scheduler, store), tags=["overview"])
    app.add_exception_handler(KairosError, on_kairos_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(openapi_of(app, telemetry=writer is not None))
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


def _opened(settings: StoreSettings | None) -> tuple[Store, Writer] | tuple[None, None]:
    """The database of the configuration, in the form that this Kairos needs, and who writes into it."""
    if settings is None:
        return None, None
    store = Store(settings.url.get_secret_value())
    require_served(store)
    return store, Writer(store, settings.queued_rows)


def require_loopback(host: str) -> None:
    """Pass an address that only this machine can reach.

    Raises:
        ConfigError: others can, and there are no keys to tell them apart.
    """
    if not is_loopback(host):
        raise ConfigError(f"host '{host}' is open to other machines, and the service has no keys yet; use 127.0.0.1")
