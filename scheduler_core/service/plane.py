"""What the parts of the control plane share, and what a part is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol

from starlette.routing import BaseRoute

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.replay import Replay
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.store.changes import Changes
from kairos.scheduler_core.service.store.session import Store
from kairos.scheduler_core.service.store.writer import Writer


@dataclass(frozen=True, slots=True)
class Database:
    """The store of a running service, who writes into it, and who tells what others wrote."""

    store: Store
    writer: Writer
    changes: Changes


class Reload(NamedTuple):
    """What became of the last configuration that was read while the service ran."""

    at: datetime
    problem: str | None
    """Why it was refused, and nothing changed; None: it is in force."""


@dataclass(slots=True)
class State:
    """How the service is doing, as /readyz tells it."""

    draining: bool = False
    last_reload: Reload | None = None
    lost: list[Callable[[], str | None]] = field(default_factory=list)
    """Each says what a part cannot do now, in a sentence; None: it can do everything."""
    on_reload: list[Callable[[Settings], None]] = field(default_factory=list)
    """Each takes over what is its own of a configuration that was found good, or raises StoreError and does nothing."""


@dataclass(frozen=True, slots=True)
class Plane:
    """What every part is built on."""

    settings: Settings
    scheduler: Scheduler
    database: Database | None
    """None: nothing is kept."""
    metrics: Metrics = field(default_factory=Metrics)
    state: State = field(default_factory=State)
    replay: Replay | None = None
    """None: experiments have the offered load as their covariate."""


class Part(Protocol):
    """A piece of the control plane: routes, and work in the background between `start` and `stop`."""

    def routes(self) -> Sequence[BaseRoute]:
        """Its routes."""

    def start(self) -> None:
        """Begin its work, once the application is up. It may block for a moment."""

    def stop(self) -> None:
        """End its work and return once nothing of it runs; parts stop in the reverse order of their start."""
