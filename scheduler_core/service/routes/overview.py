"""What the service is and has: liveness, readiness, metrics."""

from datetime import UTC, datetime

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kairos.scheduler_core.errors import StoreError
from kairos.scheduler_core.service.plane import Plane
from kairos.scheduler_core.service.schemas import Health, Readiness, Reloaded
from kairos.scheduler_core.service.store.queries.models import serving_models


def overview_router(plane: Plane) -> APIRouter:
    """The routes over what all parts share."""
    router = APIRouter()
    scheduler, fits = plane.scheduler, Fits(plane)

    @router.get("/healthz")
    def healthz() -> Health:
        """Say that the process answers."""
        return Health()

    @router.get("/readyz", responses={503: {"description": "It is about to end.", "model": Readiness}})
    def readyz(response: Response) -> Readiness:
        """Say where step times come from, whether the database answers, and what does not work now."""
        state = plane.state
        response.status_code = 503 if state.draining else 200
        there = fits.look()
        return Readiness(
            status="draining" if state.draining else "ready",
            model_versions={name: known.version for name, known in scheduler.profiles.by_name.items()},
            model_age_s=fits.ages_s(),
            database="none" if plane.database is None else "ready" if there else "away",
            lost=[sentence for lost in state.lost if (sentence := lost())],
            last_reload=state.last_reload
            and Reloaded(at=state.last_reload.at, taken=state.last_reload.problem is None),
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Give every metric in Prometheus' text format."""
        return Response(plane.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router


class Fits:
    """When the promoted models were fitted, as it was last seen."""

    def __init__(self, plane: Plane) -> None:
        self._database = plane.database
        self._fitted_at: dict[str, datetime] = {}

    def look(self) -> bool:
        """Ask the database; whether it answers. One that is known to be away is not waited for."""
        if self._database is None or self._database.changes.away:
            return False
        try:
            with self._database.store.read() as connection:
                serving = serving_models(connection)
        except StoreError:
            return False
        self._fitted_at = {profile_id: model.trained_at for profile_id, model in serving.items()}
        return True

    def ages_s(self) -> dict[str, float]:
        """By profile id."""
        now = datetime.now(UTC)
        return {profile_id: (now - at).total_seconds() for profile_id, at in self._fitted_at.items()}
