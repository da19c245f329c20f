"""Experiments over HTTP: planned, started, looked at, stopped; and what data planes report of them."""

import secrets
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from kairos.scheduler_core.errors import FieldsError
from kairos.scheduler_core.experiment import iso
from kairos.scheduler_core.service.experiments.checks import check_instances, divisible
from kairos.scheduler_core.service.experiments.design import RAMP_UP, Plan, Stage
from kairos.scheduler_core.service.experiments.keeper import Experiments
from kairos.scheduler_core.service.experiments.planner import hours, price
from kairos.scheduler_core.service.experiments.planning import Question, plan_from
from kairos.scheduler_core.service.experiments.runner import Runner
from kairos.scheduler_core.service.experiments.shadow import ShadowPlan
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


StrategyName = Annotated[str, Field(min_length=1, max_length=300)]
Positive = Annotated[float, Field(gt=0, le=10**12, allow_inf_nan=False)]


class StageBody(BaseModel):
    """A step of the ramp-up."""

    model_config = ConfigDict(extra="forbid")

    share: Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)]
    """Of time that the challenger gets; `sticky`: of new sessions."""
    pairs: Annotated[int | None, Field(ge=1, le=10**6)] = None
    """Null: until the experiment ends; the last stage only."""


class PlanQuestion(BaseModel):
    """What is to be compared; the rest is taken from the champion's history."""

    model_config = ConfigDict(extra="forbid")

    challenger: StrategyName
    """A strategy (its newest version) or `name@version`."""
    design: Literal["switchback", "pools", "sticky", "shadow"] = "switchback"
    """`shadow`: the challenger acts on nothing; of the fields below it takes `max_hours` and `share`."""
    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.05
    """`shadow`: of decisions that are looked at."""
    max_hours: Annotated[float, Field(gt=0, le=1440, allow_inf_nan=False)] = 48.0
    margin_pp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    effect_pp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 2.0
    challengers: Annotated[int, Field(ge=1, le=100)] = 1
    """How many are tried at the same time: they share the chance of a false alarm."""
    stages: Annotated[list[StageBody] | None, Field(min_length=1, max_length=20)] = None
    """Null: 1, 5, 25 and 50 %; `sticky`: those of them for which each arm can have instances of its own."""
    shared_queue: bool = False
    """`sticky`: requests of both arms wait in one queue, so nothing but damage can be shown."""
    covariate_before_pair: bool = False
    """Clients react to the arm, so what explains a block must come from before its pair."""
    seed: Annotated[int | None, Field(ge=0, le=2**53)] = None
    history_hours: Annotated[float, Field(gt=0, le=1440, allow_inf_nan=False)] = 168.0
    drain_s: Annotated[float | None, Field(ge=0, le=10**6, allow_inf_nan=False)] = None
    """This and the three below: taken in place of what the history says."""
    sigma: Annotated[float | None, Field(ge=0.005, le=10, allow_inf_nan=False)] = None
    requests_per_pair: Positive | None = None
    load_bounds: tuple[Positive, Positive, Positive] | None = None


class Planned(BaseModel):
    """A plan and its price."""

    plan: dict[str, Any]
    """As `POST /experiments` takes it."""
    price: str
    """Time until an effect is found in four of five experiments, by effect."""
    hours: float
    """The same for `effect_pp`."""
    warnings: list[str]


class StartBody(BaseModel):
    """What to start."""

    model_config = ConfigDict(extra="forbid")

    plan: dict[str, Any]
    """As `POST /experiments/plan` answered it."""


class Started(BaseModel):
    """The experiment that begins."""

    id: str
    starts_at: str
    """Its first slot, on the clock of experiments."""


class ExperimentSummary(BaseModel):
    """One experiment in the list."""

    id: str
    design: str
    champion: str
    challenger: str
    state: Literal["running", "ended"]
    verdict: str
    """Of one that runs: `running`; its record says how it stands."""
    started_at: str
    ended_at: datetime | None


class ExperimentList(BaseModel):
    """Experiments, the newest first."""

    experiments: list[ExperimentSummary]


MOST_HISTORY_ROWS = 500_000
_LISTED = 100
_AWAY = {"s503": "The database is away; nothing was changed."}
_UNKNOWN = problem_responses(**_AWAY, s404="There is no such experiment.")
_PLAN = problem_responses(**_AWAY, s404="There is no such strategy.", s409="The challenger is the champion.")
_START = problem_responses(**_AWAY, s404="There is no such strategy.", s409="One runs, or the champion is not active.")
_RECORDS = [{"$ref": f"#/components/schemas/{name}"} for name in ("Record", "ShadowRecord")]
_RECORD: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"schema": {"anyOf": _RECORDS}}}}}


def experiments_router(experiments: Experiments, runner: Runner) -> APIRouter:
    """The routes over one service's experiments."""
    router = APIRouter(tags=["experiments"])
    store = experiments.database.store

    @router.post("/experiments/plan", responses=_PLAN)
    def plan_experiment(body: PlanQuestion) -> Planned:
        """Say how an experiment would be laid out and what it would cost; nothing starts."""
        known = experiments.strategies.known
        challenger = known.named(body.challenger) if "@" in body.challenger else known.newest(body.challenger)
        now_s = experiments.clock.now_s()
        warnings = experiments.strategies.warnings(challenger.strategy)
        if body.design == "shadow":
            shadow = ShadowPlan(
                id="",
                champion=known.active.strategy.name,
                challenger=challenger.strategy.name,
                fixed_at=iso(now_s),
                max_hours=body.max_hours,
                share=body.share,
            )
            return Planned(plan=msgspec.to_builtins(shadow), price="nothing acts", hours=0.0, warnings=warnings)
        settings = experiments.plane.settings
        stages = RAMP_UP if body.stages is None else tuple(Stage(s.share, s.pairs) for s in body.stages)
        if body.stages is None and body.design == "sticky" and not body.shared_queue:
            stages = divisible(stages, settings.fleet)
        question = Question(
            champion=known.active.strategy.name,
            challenger=challenger.strategy.name,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            fixed_at=iso(now_s),
            decision_budget_us=settings.guards.decision_budget_s * 1e6,
            stages=stages,
            **{name: getattr(body, name) for name in _AS_ASKED},
        )
        history = queries.read_outcomes(store, now_s - body.history_hours * 3600.0, now_s, MOST_HISTORY_ROWS)
        history = history.take((history.strategy == question.champion) | (history.strategy == ""))
        plan = plan_from(question, history, runner.ask(question.champion))
        check_instances(plan, settings.fleet)
        return Planned(
            plan=msgspec.to_builtins(plan),
            price=price(plan),
            hours=hours(plan, plan.effect_pp / 100.0),
            warnings=warnings,
        )

    @router.post("/experiments", responses=_START)
    def start_experiment(body: StartBody) -> Started:
        """Start a planned experiment, a few seconds from now."""
        started = experiments.start(_plan(body.plan))
        return Started(id=started.id, starts_at=iso(started.started_at_s))

    @router.get("/experiments", responses=problem_responses(**_AWAY))
    def list_experiments() -> ExperimentList:
        """List the newest experiments."""
        with store.read() as connection:
            found = queries.latest_experiments(connection, _LISTED)
        return ExperimentList(experiments=[_summary(stored) for stored in found])

    @router.get("/experiments/{experiment_id}", responses=_RECORD | _UNKNOWN)
    def show_experiment(experiment_id: str) -> Response:
        """Give the record of an experiment as it stands."""
        return _json(experiments.record(experiment_id))

    @router.post("/experiments/{experiment_id}/stop", responses=_RECORD | _UNKNOWN)
    def stop_experiment(experiment_id: str) -> Response:
        """End an experiment; the champion is back, the interval is valid as it stands. Its record."""
        return _json(experiments.stop(experiment_id))

    @router.put("/experiments/{experiment_id}/reports/{data_plane}", responses=_UNKNOWN)
    def report(experiment_id: str, data_plane: DataPlane, body: SlotReport) -> Reported:
        """Say what a data plane did in a slot; again and again while the slot runs, and once after its end."""
        with store.write() as connection:
            content = body.model_dump(mode="json")
            queries.put_report(connection, experiment_id, data_plane, body.slot_start_s, content)
        return Reported(experiment=experiment_id, data_plane=data_plane, slot_start_s=body.slot_start_s)

    return router


_AS_ASKED = (
    *("design", "max_hours", "margin_pp", "effect_pp", "challengers", "shared_queue", "covariate_before_pair"),
    *("drain_s", "sigma", "requests_per_pair", "load_bounds"),
)


def _plan(told: dict[str, Any]) -> Plan | ShadowPlan:
    kind: type[Plan | ShadowPlan] = ShadowPlan if told.get("design") == "shadow" else Plan
    try:
        return msgspec.convert(told, kind)
    except msgspec.ValidationError as problem:
        message, _, place = str(problem).partition(" - at `$")
        raise FieldsError([(f"plan{place.rstrip('`')}", message[:1].lower() + message[1:])]) from None


def _summary(stored: queries.StoredExperiment) -> ExperimentSummary:
    return ExperimentSummary(
        id=stored.id,
        design=stored.design,
        champion=stored.plan["champion"],
        challenger=stored.plan["challenger"],
        state=stored.state,
        verdict="running" if stored.record is None else stored.record["verdict"],
        started_at=iso(stored.started_at_s),
        ended_at=stored.ended_at,
    )


def _json(record: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(record), media_type="application/json")
