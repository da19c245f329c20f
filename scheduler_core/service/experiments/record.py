"""The record of an experiment, and its proof: everything in it follows from plan, seed and observed pairs alone."""

import math
from collections.abc import Sequence

import msgspec

from kairos.scheduler_core.service.experiments.design import Design, Pair, Plan, Stage, coins, mock_of
from kairos.scheduler_core.service.experiments.evidence import SignFlips, adjust, sigma_of
from kairos.scheduler_core.service.experiments.sequence import covariate, differences, weights
from kairos.scheduler_core.service.experiments.verdict import Ending, Finding, judge

METHOD = {
    "switchback": "sech-mixture e-process, docs/statistics.md",
    "pools": "sech-mixture e-process, docs/statistics.md",
    "sticky": "gaussian-mixture e-process, docs/statistics.md",
}
ESTIMAND = {
    "switchback": "change in attainment if the whole fleet ran the challenger, over the load seen",
    "pools": "change in attainment of a pool of half the size at half the traffic, over the load seen",
    "sticky": "difference between sessions of both arms at the share they ran at",
}
SHARED_QUEUE = "none: both arms wait in one queue"


class ChampionAlone(msgspec.Struct, frozen=True):
    """The champion against itself, where it ran alone: how well the method is. For display; no verdict rests on it."""

    log_e: float
    """Evidence for a difference that cannot be: the larger of both sides; above 3.9 something is wrong."""
    sigma: float | None
    """As the plan's, of these pairs; None: there are none."""
    pairs: tuple[Pair, ...]


class Record(Finding, frozen=True, kw_only=True):
    """What is kept for good, as JSON."""

    id: str
    design: Design
    champion: str
    challenger: str
    metric: str = "slo_attainment"
    unit: str
    estimand: str
    coins: str
    """Of each pair in `pairs`, void ones too; empty where sessions have coins of their own."""
    method: str
    plan: Plan
    ending: Ending | None
    stages: tuple[Stage, ...]
    """As run; the plan's, from the first."""
    started_at: str
    stopped_at: str | None
    generation: int
    """Of the active strategy since the stop."""
    champion_alone: ChampionAlone


def record_of(
    plan: Plan,
    pairs: Sequence[Pair],
    ending: Ending | None,
    started_at: str,
    stopped_at: str | None,
    generation: int,
    champion_pairs: Sequence[Pair] = (),
) -> Record:
    """The record of an experiment as it stands.

    Args:
        champion_pairs: of the champion against itself.

    Raises:
        InputError: pairs are not in order, each once.
    """
    finding = judge(plan, pairs, ending)
    block = f"{plan.lengths.block_s:.0f} s block{'s' if plan.design == 'switchback' else ''}"
    return Record(
        **{name: getattr(finding, name) for name in Finding.__struct_fields__},
        id=plan.id,
        design=plan.design,
        champion=plan.champion,
        challenger=plan.challenger,
        unit=f"pair of {block}" if plan.design == "switchback" else block,
        estimand=SHARED_QUEUE if plan.shared_queue else ESTIMAND[plan.design],
        coins="" if plan.design == "sticky" else coins(plan, (pair.i for pair in pairs)),
        method=METHOD[plan.design],
        plan=plan,
        ending=ending,
        stages=_stages_run(plan, pairs),
        started_at=started_at,
        stopped_at=stopped_at,
        generation=generation,
        champion_alone=_champion_alone(plan, champion_pairs),
    )


def _champion_alone(plan: Plan, pairs: Sequence[Pair]) -> ChampionAlone:
    if not pairs:
        return ChampionAlone(0.0, None, ())
    mock = mock_of(plan)
    w = weights(mock, pairs)
    d, x = differences(mock, pairs, w), covariate(mock, pairs, w)
    evidence = SignFlips(plan.sigma)
    found = [evidence.log_e_better(side * adjust(d, x))[-1] for side in (1.0, -1.0)]
    return ChampionAlone(float(max(found)), sigma_of(d, x), tuple(pairs))


def _stages_run(plan: Plan, pairs: Sequence[Pair]) -> tuple[Stage, ...]:
    """Each stage's share with the pairs that closed in it."""
    counts = [(stage.share, sum(pair.share == stage.share for pair in pairs)) for stage in plan.stages]
    return tuple(Stage(share, count) for share, count in counts if count)


def verify(record: Record) -> str | None:
    """The first figure that does not follow from the plan and the observed pairs, with both values; None if all do.

    Raises:
        InputError: its pairs are not in order, each once.
    """
    observed = [pair.observed for pair in record.pairs]
    dates = record.started_at, record.stopped_at
    again = record_of(record.plan, observed, record.ending, *dates, record.generation, record.champion_alone.pairs)
    return _first_difference(msgspec.to_builtins(record), msgspec.to_builtins(again), "")


def _first_difference(said: object, found: object, where: str) -> str | None:
    """Where two trees of plain values part; floats may differ by rounding in the last digits."""
    if isinstance(said, dict) and isinstance(found, dict) and said.keys() == found.keys():
        children = [(said[key], found[key], f"{where}.{key}" if where else str(key)) for key in said]
    elif isinstance(said, list | tuple) and isinstance(found, list | tuple) and len(said) == len(found):
        children = [(a, b, f"{where}[{k}]") for k, (a, b) in enumerate(zip(said, found, strict=True))]
    elif said == found or (isinstance(said, float) and isinstance(found, float) and _near(said, found)):
        return None
    else:
        return f"{where}: the record says {said}, its pairs give {found}"
    return next((problem for child in children if (problem := _first_difference(*child))), None)


def _near(said: float, found: float) -> bool:
    """Equal but for the last digits, which may differ between machines."""
    return math.isclose(said, found, rel_tol=1e-9, abs_tol=1e-9)
