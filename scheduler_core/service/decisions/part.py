"""The part of the control plane that records decisions and tells them again."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.routing import BaseRoute

from kairos.scheduler_core.errors import NotFoundError, NotSampledError
from kairos.scheduler_core.service.access import tenant_of
from kairos.scheduler_core.service.decisions.explanation import Explanation, explain
from kairos.scheduler_core.service.decisions.recorder import Recorder, in_sample
from kairos.scheduler_core.service.plane import Database, Plane
from kairos.scheduler_core.service.problems import RequestIdPath, problem_responses
from kairos.scheduler_core.service.store.queries.decisions import decisions_of, outcome_of

_encode = msgspec.json.Encoder().encode
_TOLD: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What is known of it.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Explanation"}}},
    }
}


class Decisions:
    """Watches the scheduler, where there is a store to record into."""

    def __init__(self, plane: Plane, database: Database) -> None:
        self._plane, self._database = plane, database
        scheduler = plane.scheduler
        self.recorder = Recorder(database, plane.settings.decisions, lambda: scheduler.profiles, plane.metrics)

    def routes(self) -> Sequence[BaseRoute]:
        """`GET /requests/{request_id}/explanation`."""
        router = APIRouter(tags=["requests"])

        @router.get(
            "/requests/{request_id:path}/explanation",  # ids may hold slashes
            response_class=Response,
            response_model=None,
            responses=_TOLD
            | problem_responses(
                s404="Nothing was recorded of it; the type is `not_sampled` where that is why.",
                s503="The database is away.",
            ),
        )
        def explanation(request_id: RequestIdPath, request: Request) -> Response:
            """Say why a request waited, where it went, and what was predicted against what happened."""
            told = self.explanation(request_id, tenant_of(request.scope))
            return Response(_encode(told), media_type="application/json")

        return router.routes

    def start(self) -> None:
        """Record from now on."""
        self.recorder.start()
        self._plane.scheduler.watchers += (self.recorder.watch,)

    def stop(self) -> None:
        """Store what is left."""
        self.recorder.stop()

    def explanation(self, request_id: str, tenant: str | None) -> Explanation:
        """What was recorded of a request, and what became of it.

        Args:
            tenant: of the caller, who is told of its own requests only; None: of any.

        Raises:
            NotSampledError, NotFoundError: nothing was recorded.
            StoreError: the database is away.
        """
        with self._database.store.read() as connection:
            rows = decisions_of(connection, request_id, tenant)
            outcome = outcome_of(connection, request_id, tenant)
        if rows:
            return explain(request_id, rows, outcome)
        share = self._plane.settings.decisions.sample_share
        if in_sample(request_id, share):
            raise NotFoundError(f"no request '{request_id}' is known here; what was just decided may not be stored yet")
        raise NotSampledError(
            f"not_sampled: nothing was recorded of request '{request_id}': a share of {share:g} is "
            "(decisions.sample_share), and those that are late, rejected, guarded, failed or wait long"
        )
