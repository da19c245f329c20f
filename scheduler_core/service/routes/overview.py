"""What the service is and has: liveness, readiness, metrics."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kairos.scheduler_core.service.plane import Plane
from kairos.scheduler_core.service.schemas import Health, Readiness


def overview_router(plane: Plane) -> APIRouter:
    """The routes over what all parts share."""
    router = APIRouter()
    scheduler, store = plane.scheduler, plane.database.store if plane.database else None

    @router.get("/healthz")
    def healthz() -> Health:
        """Say that the process answers."""
        return Health()

    @router.get("/readyz")
    def readyz() -> Readiness:
        """Say where step times come from, once all are loaded, and whether the database answers."""
        return Readiness(
            model_versions={name: known.version for name, known in scheduler.profiles.by_name.items()},
            database="none" if store is None else "ready" if store.is_there() else "away",
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Give every metric in Prometheus' text format."""
        return Response(plane.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
