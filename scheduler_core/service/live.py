"""The part of the control plane that says which strategy runs: versions, the active one, experiments between two."""

from collections.abc import Sequence

from starlette.routing import BaseRoute

from kairos.scheduler_core.experiment import Clock
from kairos.scheduler_core.service.experiments.keeper import Experiments
from kairos.scheduler_core.service.experiments.replaying import ReplayProcess
from kairos.scheduler_core.service.experiments.runner import Runner
from kairos.scheduler_core.service.experiments.shadowing import Shadow
from kairos.scheduler_core.service.plane import Plane
from kairos.scheduler_core.service.routes.experiments import experiments_router
from kairos.scheduler_core.service.routes.strategies import strategies_router
from kairos.scheduler_core.service.strategies import Strategies


class Live:
    """Strategies, and experiments where there is a store."""

    def __init__(self, plane: Plane, clock: Clock | None = None) -> None:
        """Take over what the store says.

        Args:
            clock: of experiments; None: as the configuration has it.
        """
        self.strategies = Strategies(plane)
        self.experiments: Experiments | None = None
        self.runner: Runner | None = None
        self.shadow: Shadow | None = None
        if plane.database:
            self.experiments = Experiments(
                plane, plane.database, self.strategies, clock or Clock(plane.settings.service.clock_scale)
            )
            self.shadow = Shadow(self.experiments)
            self.runner = Runner(
                self.experiments, ReplayProcess(plane.replay, plane.metrics.replays_failed) if plane.replay else None
            )

    def routes(self) -> Sequence[BaseRoute]:
        """Its routes."""
        routes = list(strategies_router(self.strategies, self.experiments).routes)
        if self.experiments and self.runner:
            routes += experiments_router(self.experiments, self.runner).routes
        return routes

    def start(self) -> None:
        """Begin to run experiments."""
        for worker in (self.runner, self.shadow):
            if worker:
                worker.start()

    def stop(self) -> None:
        """Leave them to other replicas."""
        for worker in (self.runner, self.shadow):
            if worker:
                worker.stop()
