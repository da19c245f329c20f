"""Whether a plan can be run as it is written: it comes from outside, by way of an operator."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from kairos.scheduler_core.config import Fleet
from kairos.scheduler_core.errors import FieldsError
from kairos.scheduler_core.service.experiments.design import LONGEST_BLOCK_S, Plan, Stage
from kairos.scheduler_core.service.experiments.evidence import SIGMA_FLOOR
from kairos.scheduler_core.service.experiments.shadow import ShadowPlan

LONGEST_H = 60 * 24.0
LARGEST_SHARE = 0.5


def check_plan(plan: Plan) -> Plan:
    """The plan itself.

    Raises:
        FieldsError: every field that cannot be run, by its path.
    """
    if problems := [*_times(plan), *_statistics(plan), *_stages(plan)]:
        raise FieldsError(problems)
    return plan


def check_instances(plan: Plan, fleet: Fleet) -> None:
    """Pass a plan whose arms can have instances of their own where its design wants that (`sticky`).

    In each stage as large a share of them as of the sessions, or the difference would be one of load. Not looked at:
    roles of which only a name service knows how many instances there are.

    Raises:
        FieldsError: every stage that they cannot be divided for.
    """
    if plan.design != "sticky" or plan.shared_queue:
        return
    problems = []
    for role in ("prefill", "decode", "mixed"):
        if len(profiles := {group.profile for group in getattr(fleet, role)}) > 1:
            problems.append(
                ("design", f"{role} instances of {', '.join(sorted(profiles))} make no arms that are alike")
            )
    for k, stage in enumerate(plan.stages):
        if found := _indivisible(stage.share, fleet):
            needs = "each arm of sticky has instances of its own"
            problems.append((f"stages[{k}].share", f"{stage.share:g} of {found} is no whole number, and {needs}"))
    if problems:
        raise FieldsError(problems)


def divisible(stages: Sequence[Stage], fleet: Fleet) -> tuple[Stage, ...]:
    """Those of a ramp-up for which both arms can have instances of their own; the last of all goes on to the end."""
    return (*(stage for stage in stages[:-1] if not _indivisible(stage.share, fleet)), stages[-1])


def _indivisible(share: float, fleet: Fleet) -> str:
    """The instances of a role of which that share is no whole number; empty: there is none."""
    groups = list(fleet.groups())
    unknown = {role for role, _, group in groups if group.url is not None and group.url.startswith("dns+")}
    counts = Counter[str]()
    for role, _, group in groups:
        if role not in unknown:
            counts[role] += group.count
    for name, count in counts.items():
        own = round(share * count)
        if not own or not math.isclose(share * count, own):
            return f"{count} {name} instance{'s' if count > 1 else ''}"
    return ""


def check_shadow(plan: ShadowPlan) -> None:
    """Pass a shadow that can be run.

    Raises:
        FieldsError: every field that cannot be run, by its path.
    """
    problems = []
    if plan.champion == plan.challenger:
        problems.append(("challenger", "is the champion; name another version"))
    if not 0.0 < plan.share <= 1.0:
        problems.append(("share", "needs above 0, 1 at most"))
    if not 0.0 < plan.max_hours <= LONGEST_H:
        problems.append(("max_hours", f"needs above 0, {LONGEST_H:.0f} at most"))
    if problems:
        raise FieldsError(problems)


def _times(plan: Plan) -> Iterator[tuple[str, str]]:
    lengths = plan.lengths
    if plan.champion == plan.challenger:
        yield "challenger", "is the champion; name another version"
    if not 60.0 <= lengths.block_s <= LONGEST_BLOCK_S:
        yield "lengths.block_s", f"needs 60 to {LONGEST_BLOCK_S:.0f} s"
    for name in ("burn_s", "tail_s", "settle_s", "drain_p90_s"):
        if not 0.0 <= getattr(lengths, name) < math.inf:
            yield f"lengths.{name}", "needs a number from 0"
    if not lengths.burn_s + lengths.tail_s <= lengths.block_s / 2:
        yield "lengths", "less than half of a block counts"
    if not 0.0 < plan.max_hours <= LONGEST_H:
        yield "max_hours", f"needs above 0, {LONGEST_H:.0f} at most"


def _statistics(plan: Plan) -> Iterator[tuple[str, str]]:
    sigmas = {"sigma": plan.sigma} | {f"guards.{n}": s for n, s in plan.guards.items()}
    for name, sigma in (sigmas | {f"groups.{n}": s for n, s in plan.groups.items()}).items():
        if not SIGMA_FLOOR <= sigma < math.inf:
            yield name, f"needs at least {SIGMA_FLOOR}"
    if not 0.0 < plan.requests_per_pair < math.inf:
        yield "requests_per_pair", "needs a number above 0"
    low, middle, high = plan.load_bounds
    if not 0.0 <= low <= middle <= high < math.inf:
        yield "load_bounds", "needs three rising numbers"
    for name in ("better", "harm", "guards"):
        if not 0.0 < getattr(plan.alpha, name) <= 0.2:
            yield f"alpha.{name}", "needs above 0, 0.2 at most"
    for name in ("margin_pp", "effect_pp"):
        if not 0.0 < getattr(plan, name) <= 100.0:
            yield name, "needs above 0, 100 points at most"


def _stages(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.stages or plan.stages[-1].pairs is not None:
        yield "stages", "the last one needs pairs null: until the experiment ends"
    for k, stage in enumerate(plan.stages):
        if not 0.0 < stage.share <= LARGEST_SHARE:
            yield f"stages[{k}].share", f"needs above 0, {LARGEST_SHARE} at most"
        if k < len(plan.stages) - 1 and (stage.pairs is None or stage.pairs < 1):
            yield f"stages[{k}].pairs", "needs at least 1"
        if plan.design == "sticky" and k and stage.share < plan.stages[k - 1].share:
            yield f"stages[{k}].share", "is below that of the stage before: sessions would leave the challenger"
