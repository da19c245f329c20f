"""Strategies over HTTP: their versions, which is active, and all that a data plane needs to run it."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from msgspec import structs
from pydantic import BaseModel, ConfigDict, Field

from kairos.scheduler_core.config import StrategySettings
from kairos.scheduler_core.experiment import Clock
from kairos.scheduler_core.service.experiments.keeper import Experiments
from kairos.scheduler_core.service.problems import problem_responses
from kairos.scheduler_core.service.strategies import Known, Strategies, Version

NewName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class StrategyText(BaseModel):
    """A strategy by name, as it would be used."""

    name: str
    text: str
    """PREFILL+PREFILL_PLACEMENT+DECODE_PLACEMENT+DECODE[+ADMISSION]"""
    version: int
    """The newest; 0: of the configuration, nothing is kept."""


class StrategyList(BaseModel):
    """Which strategies there are."""

    active: str
    """As `/schedule` takes it."""
    strategies: list[StrategyText]


class StrategyVersion(BaseModel):
    """A version of a strategy; it never changes."""

    name: str
    version: int
    policies: dict[str, Any]
    """As in the configuration: a policy for each kind."""
    text: str
    created_at: datetime | None = None


class StrategyVersions(BaseModel):
    """All versions of a strategy, the newest first."""

    name: str
    versions: list[StrategyVersion]


class StrategyPut(StrategyVersion):
    """The version that holds what was put."""

    warnings: list[str]
    """What the control of the configured fleet does not apply."""


class Activation(BaseModel):
    """Which strategy to use from now on."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    version: Annotated[int | None, Field(ge=1, le=10**9)] = None
    """Null: the newest."""
    stop_experiment: bool = False
    """End the experiment that compares the active strategy with another; otherwise it forbids the change."""


class BlockLengths(BaseModel):
    """Which arrivals of a slot count."""

    block_s: float
    burn_s: float
    """Those of the first so many seconds do not."""
    tail_s: float
    """Those of the last so many seconds do not."""
    settle_s: float


class RunningExperiment(BaseModel):
    """The experiment that a data plane takes part in."""

    id: str
    design: str
    challenger: StrategyVersion
    lengths: BlockLengths
    schedule: str
    """What runs when, signed: `scheduler_core.experiment.read_schedule` reads it."""
    key_id: str
    """Which key it is signed with: the beginning of the key's SHA-256, in hexadecimal."""


class ActiveStrategy(StrategyVersion):
    """What a data plane runs, pulled at least every 2 seconds."""

    generation: int
    """Rises with every change; of two answers, the higher one holds."""
    now_s: float
    """This instant on the clock of experiments."""
    clock_scale: float
    experiment: RunningExperiment | None = None


_AWAY = {"s503": "The database is away; nothing was changed."}
_SHOW = problem_responses(s404="There is no such strategy.")
_PUT = problem_responses(**_AWAY, s404="A policy is not installed.")
_ACTIVATE = problem_responses(**_AWAY, s404="There is no such strategy or version.", s409="An experiment runs.")
_ROLL_BACK = problem_responses(
    **_AWAY, s409="Nothing else was active before, or an experiment runs.", s422="The service keeps nothing."
)


def strategies_router(part: Strategies, experiments: Experiments | None) -> APIRouter:
    """The routes over one service's strategies; None: it keeps nothing, so no experiment runs."""
    router = APIRouter(tags=["strategies"])
    clock = Clock(part.plane.settings.service.clock_scale)

    def active() -> ActiveStrategy:
        known = part.known
        return ActiveStrategy(
            **_told(known.active),
            generation=known.generation,
            now_s=clock.now_s(),
            clock_scale=clock.scale,
            experiment=running(known),
        )

    def running(known: Known) -> RunningExperiment | None:
        found = experiments.running if experiments else None
        if experiments is None or found is None or found.plan.champion != known.active.strategy.name:
            return None
        schedule, key_id = experiments.signed(found)
        return RunningExperiment(
            id=found.plan.id,
            design=found.plan.design,
            challenger=StrategyVersion(**_told(known.named(found.plan.challenger))),
            lengths=BlockLengths(**structs.asdict(found.plan.lengths)),
            schedule=schedule,
            key_id=key_id,
        )

    @router.get("/strategies")
    def list_strategies() -> StrategyList:
        """List the strategies; `/schedule` takes each by its name."""
        known = part.known
        newest = [known.newest(name) for name in dict.fromkeys(v.name for v in known.versions.values())]
        listed = [StrategyText(name=v.name, text=v.strategy.text, version=v.version) for v in newest]
        return StrategyList(active=known.active.strategy.name, strategies=listed)

    @router.get("/strategies/active")
    def show_active() -> ActiveStrategy:
        """Say which strategy is active, and the experiment that runs: all that a data plane needs."""
        return active()

    @router.put("/strategies/active", responses=_ACTIVATE)
    def activate(body: Activation) -> ActiveStrategy:
        """Use a version of a strategy from now on, on every data plane within 2 seconds."""
        part.activate(body.name, body.version, body.stop_experiment)
        return active()

    @router.post("/strategies/rollback", responses=_ROLL_BACK)
    def roll_back() -> ActiveStrategy:
        """Use again what was active before."""
        part.rollback()
        return active()

    @router.get("/strategies/{name}", responses=_SHOW)
    def show_strategy(name: str) -> StrategyVersions:
        """Show all versions of a strategy."""
        part.known.newest(name)
        versions = [v for v in part.known.versions.values() if v.name == name]
        return StrategyVersions(name=name, versions=[StrategyVersion(**_told(v)) for v in reversed(versions)])

    @router.put("/strategies/{name}", responses=_PUT)
    def put_strategy(name: NewName, body: StrategySettings) -> StrategyPut:
        """Keep a version of a strategy, checked as in the configuration; it is used once it is activated."""
        version, warnings = part.put(name, body)
        return StrategyPut(**_told(version), warnings=warnings)

    return router


def _told(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "policies": version.policies,
        "text": version.strategy.text,
        "created_at": version.created_at,
    }
