"""What the service is and has: liveness, readiness, strategies."""

from fastapi import APIRouter

from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Health, Readiness, Strategies, StrategyText


def overview_router(scheduler: Scheduler) -> APIRouter:
    """The routes over one scheduler."""
    router = APIRouter()

    @router.get("/healthz")
    def healthz() -> Health:
        """Say that the process answers."""
        return Health()

    @router.get("/readyz")
    def readyz() -> Readiness:
        """Say where step times come from; it answers once all of them are loaded."""
        return Readiness(model_versions={name: known.version for name, known in scheduler.profiles.by_name.items()})

    @router.get("/strategies")
    def strategies() -> Strategies:
        """List the strategies of the configuration; `/schedule` takes each by its name."""
        return Strategies(
            active=scheduler.settings.active,
            strategies=[StrategyText(name=name, text=s.text) for name, s in scheduler.strategies.items()],
        )

    return router
