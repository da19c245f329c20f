"""What the service is and has: liveness, readiness, strategies."""

from fastapi import APIRouter

from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import Health, Readiness, Strategies, StrategyText
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
            troubles=list(scheduler.profiles.troubles),
        )

    @router.get("/strategies")
    def strategies() -> Strategies:
        """List the strategies of the configuration; `/schedule` takes each by its name."""
        return Strategies(
            active=scheduler.active,
            strategies=[StrategyText(name=name, text=s.text) for name, s in scheduler.strategies.items()],
        )

    return router
