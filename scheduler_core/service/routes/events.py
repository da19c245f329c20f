"""`GET /events`: what happened that an operator would want to know."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from kairos.scheduler_core.service.problems import problem_responses
from kairos.scheduler_core.service.store.queries.events import latest_events
from kairos.scheduler_core.service.store.session import Store


class EventTold(BaseModel):
    """A training that failed, a drift alarm, a promotion, a verdict, a configuration: each is one."""

    id: int
    at: datetime
    kind: str
    subject: str
    """Which profile, model, strategy, experiment, instance or file."""
    detail: dict[str, Any]


class Events(BaseModel):
    """Some of them, the newest first."""

    events: list[EventTold]
    before: int | None
    """What to ask for to get older ones; null: there are none."""


def events_router(store: Store) -> APIRouter:
    """The route over one database."""
    router = APIRouter()

    @router.get("/events", responses=problem_responses(s503="The database is away."))
    def events(
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        before: Annotated[int | None, Query(ge=1, le=2**62, description="`before` of the page before.")] = None,
    ) -> Events:
        """List events, the newest first; `before` leads to older ones."""
        with store.read() as connection:
            rows = latest_events(connection, limit + 1, before)
        told = [EventTold(**row._asdict()) for row in rows[:limit]]
        return Events(events=told, before=told[-1].id if len(rows) > limit else None)

    return router
