"""Experiments over HTTP: planned, started, looked at, stopped; and what data planes report of them."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from kairos.scheduler_core.service.plane import Database
from kairos.scheduler_core.service.problems import problem_responses
from kairos.scheduler_core.service.store.queries import experiments as queries

Count = Annotated[int, Field(ge=0, le=10**12)]
Seconds = Annotated[float, Field(ge=0, le=10**12, allow_inf_nan=False)]
DataPlane = Annotated[str, Path(max_length=256, pattern=r"^[!-~]+$")]


class ArmReport(BaseModel):
    """What a data plane did for the requests that the coin gave one arm, so far in the slot."""

    model_config = ConfigDict(extra="forbid")

    requests: Count = 0
    """Arrivals in the counted part of the slot, whatever became of them."""
    decisions: Count = 0
    """In the whole slot."""
    counted_decisions: Count = 0
    """After the burn-in."""
    wrong_arm: Count = 0
    """Of those, made by the other arm's strategy."""
    exceptions: Count = 0
    """Raised by the strategy."""
    fallbacks: Count = 0
    """Decisions that a guard answered with arrival order."""
    decision_p99_us: Annotated[float, Field(ge=0, le=10**12, allow_inf_nan=False)] = 0.0
    worst_wait_s: Seconds = 0.0
    """Requests that still wait included."""


class SlotReport(BaseModel):
    """One data plane in one slot of an experiment; a later report of the same slot takes its place."""

    model_config = ConfigDict(extra="forbid")

    slot_start_s: Annotated[float, Field(ge=0, le=10**12, allow_inf_nan=False)]
    """As the schedule has it."""
    champion: ArmReport | None = None
    """Null: the slot has none of this arm."""
    challenger: ArmReport | None = None
    healthy: bool = True
    """False: an instance that served the challenger lost its health check in this slot."""


class Reported(BaseModel):
    """The report is kept."""

    experiment: str
    data_plane: str
    slot_start_s: float


_AWAY = {"s503": "The database is away; nothing was changed."}
_REPORT = problem_responses(**_AWAY, s404="There is no such experiment.")


def experiments_router(database: Database) -> APIRouter:
    """The routes over one service's experiments."""
    router = APIRouter(tags=["experiments"])

    @router.put("/experiments/{experiment_id}/reports/{data_plane}", responses=_REPORT)
    def report(experiment_id: str, data_plane: DataPlane, body: SlotReport) -> Reported:
        """Say what a data plane did in a slot; again and again while the slot runs, and once after its end."""
        with database.store.write() as connection:
            content = body.model_dump(mode="json")
            queries.put_report(connection, experiment_id, data_plane, body.slot_start_s, content)
        return Reported(experiment=experiment_id, data_plane=data_plane, slot_start_s=body.slot_start_s)

    return router
