"""What the service is and has: liveness, readiness."""

from fastapi import APIRouter

from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Health, Readiness
from kairos.scheduler_core.service.store.session import Store


def overview_router(scheduler: Scheduler, store: Store | None) -> APIRouter:
    """The routes over one scheduler, and what it remembers."""
    router = APIRouter()

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

    return router
