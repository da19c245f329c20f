"""The part of the control plane that says which strategy runs: versions, the active one, experiments between two."""

from collections.abc import Sequence

from starlette.routing import BaseRoute

from kairos.scheduler_core.service.plane import Plane
from kairos.scheduler_core.service.routes.experiments import experiments_router
from kairos.scheduler_core.service.routes.strategies import strategies_router
from kairos.scheduler_core.service.strategies import Strategies


class Live:
    """Strategies and experiments of one service."""

    def __init__(self, plane: Plane) -> None:
        self.strategies = Strategies(plane)
        self.database = plane.database

    def routes(self) -> Sequence[BaseRoute]:
        """Its routes."""
        routes = list(strategies_router(self.strategies).routes)
        if self.database:
            routes += experiments_router(self.database).routes
        return routes

    def start(self) -> None:
        """Nothing yet."""

    def stop(self) -> None:
        """Nothing yet."""
