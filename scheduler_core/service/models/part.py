"""The models as a part of the control plane."""

from collections.abc import Sequence

from starlette.routing import BaseRoute

from kairos.scheduler_core.service.models.book import Book
from kairos.scheduler_core.service.models.routes import model_routes
from kairos.scheduler_core.service.models.trainer import Trainer
from kairos.scheduler_core.service.plane import Database, Plane


class ModelsPart:
    """Book, trainer and routes over one database."""

    def __init__(self, plane: Plane, database: Database) -> None:
        self._plane, self._database = plane, database
        self._book = Book(database.store, plane.settings, plane.scheduler, plane.metrics)
        self._trainer = Trainer(database.store, plane.settings)
        database.changes.watch("models", self._book.look)
        plane.state.lost.append(self._book.lost)
        plane.state.on_reload.append(self._book.configure)

    def routes(self) -> Sequence[BaseRoute]:
        """Lifecycle and predictions."""
        return model_routes(self._book, self._database.store, self._plane.settings, self._look)

    def start(self) -> None:
        """Have telemetry watched and models trained."""
        self._trainer.start()

    def stop(self) -> None:
        """End a training that runs; it is taken up again."""
        self._trainer.stop()

    def _look(self) -> None:
        self._database.changes.look("models")
