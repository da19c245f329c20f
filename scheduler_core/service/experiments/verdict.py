"""From a plan and its closed pairs to a word, a sentence and every figure behind them.

Pure: the same plan and pairs give the same finding, on any replica and in `record.verify`. Figures named `_pp` are
points of attainment; the rest are shares or logarithms. Rules and their sources: docs/statistics.md.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.experiments.design import Limits, Pair, Plan
from kairos.scheduler_core.service.experiments.evidence import Evidence, GaussianMixture, SignFlips, adjust
from kairos.scheduler_core.service.experiments.planner import (
    FEWEST_PAIRS_FOR_BETTER,
    FEWEST_PAIRS_TO_STOP,
    in_words,
    n80,
)
from kairos.scheduler_core.service.experiments.sequence import (
    by_arm,
    covariate,
    differences,
    is_void,
    shares_by_arm,
    weights,
)
from kairos.scheduler_core.service.experiments.validity import Validity, keys_suffice, validity_of
from kairos.scheduler_core.slo import FloatArray

Word = Literal[
    "running",
    "better-so-far",
    "better",
    "mixed",
    "worse",
    "stopped-by-guard",
    "no-difference",
    "undecided",
    "not-measurable",
    "stopped-by-user",
]

STRATA = ("0-50", "50-75", "75-90", "90-100")
FEWEST_PAIRS_A_STRATUM = 3
CLEARLY_WORSE_T = -1.0
FEWEST_REQUESTS_FOR_ERRORS = 50
LARGEST_FALLBACK_SHARE = 0.01


# --- absolute guards: one block, no statistics -----------------------------------------------------------------------


class BlockHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What the challenger did in one block, so far."""

    requests: int
    errors: int
    decisions: int
    exceptions: int
    """Raised by the strategy."""
    fallbacks: int
    """Decisions that a guard answered with arrival order."""
    decision_p99_us: float
    healthy: bool
    worst_wait_s: float
    replayed_worst_wait_s: float
    """Of the champion, replayed on the same arrivals."""


class Breach(msgspec.Struct, frozen=True):
    """A guard that acted: what was measured and what was allowed."""

    name: str
    measured: float
    limit: float


def absolute_breaches(health: BlockHealth, limits: Limits) -> list[Breach]:
    """Which absolute guards act on a block. Attainment is none of them: a burst lowers it under any strategy."""
    error_limit = limits.error_rate_p999 + 0.01
    error_rate = health.errors / health.requests if health.requests else 0.0
    fallback_share = health.fallbacks / health.decisions if health.decisions else 0.0
    found = []
    if health.requests >= FEWEST_REQUESTS_FOR_ERRORS and error_rate > error_limit:
        found.append(Breach("error rate", error_rate, error_limit))
    if health.exceptions:
        found.append(Breach("strategy exceptions", float(health.exceptions), 0.0))
    if fallback_share > LARGEST_FALLBACK_SHARE:
        found.append(Breach("guard fallback share", fallback_share, LARGEST_FALLBACK_SHARE))
    if health.decision_p99_us > limits.decision_budget_us:
        found.append(Breach("decision p99 in us", health.decision_p99_us, limits.decision_budget_us))
    if not health.healthy:
        found.append(Breach("lost health checks", 1.0, 0.0))
    if health.worst_wait_s > wait_limit_s(limits) and health.replayed_worst_wait_s < health.worst_wait_s / 2:
        found.append(Breach("worst wait in s", health.worst_wait_s, wait_limit_s(limits)))
    return found


def wait_limit_s(limits: Limits) -> float:
    """A wait above it is blamed on the challenger, unless the replayed champion would not have halved it."""
    return max(10.0 * limits.ttft_target_s, 2.0 * limits.worst_wait_s)


class Ending(msgspec.Struct, frozen=True):
    """Why an experiment ends whatever its evidence says."""

    reason: Literal["user", "time", "guard"]
    breach: Breach | None = None
    """Of the absolute guard."""


# --- findings --------------------------------------------------------------------------------------------------------


class Difference(msgspec.Struct, frozen=True):
    """Challenger minus champion in points, with an interval that may be looked at any time."""

    mean: float
    low: float
    high: float
    level: float = 0.95


class EvidenceFound(msgspec.Struct, frozen=True):
    """Log e-values after the last pair, and what each must reach."""

    log_e_better: float
    log_e_harm: float
    better_needs: float
    harm_needs: float


class Numbers(msgspec.Struct, frozen=True):
    """How much was seen."""

    pairs: int
    """Without the void ones."""
    void: int
    champion_requests: int
    challenger_requests: int
    unresolved: int


class Stratum(msgspec.Struct, frozen=True):
    """Pairs whose offered load lay between two percentiles of the last 7 days."""

    stratum: str
    pairs: int
    mean_pp: float
    t: float


class GuardFound(msgspec.Struct, frozen=True):
    """A share of requests that must not grow, per arm, and the evidence that it does."""

    name: str
    champion: float
    challenger: float
    log_e: float
    needs: float
    breached: bool


class GroupFound(msgspec.Struct, frozen=True):
    """Attainment of a group of requests per arm; an interval and no verdict."""

    name: str
    champion: float
    challenger: float
    difference_pp: Difference


class JudgedPair(msgspec.Struct, frozen=True):
    """A pair as observed and what the test made of it; `d` and `x` carry the weight and the coin."""

    observed: Pair
    void: bool
    d: float
    x: float
    w: float
    log_e_better: float
    """After this pair."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict and everything it rests on."""

    verdict: Word
    sentence: str
    stops: bool
    """Whether the experiment ends here, with the champion back in place."""
    difference_pp: Difference
    evidence: EvidenceFound
    n: Numbers
    by_load: tuple[Stratum, ...]
    by_group: tuple[GroupFound, ...]
    guards: tuple[GuardFound, ...]
    validity: Validity
    pairs: tuple[JudgedPair, ...]


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(plan: Plan, pairs: Sequence[Pair], ending: Ending | None = None) -> Finding:
    """What the closed pairs say, whenever asked.

    Raises:
        InputError: pairs are not in order, each once.
    """
    numbers = [pair.i for pair in pairs]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise InputError(f"pairs must come in order, each once; found {numbers}")
    valid = [pair for pair in pairs if not is_void(pair)]
    w = weights(plan, valid)
    raw = differences(plan, valid, w)
    x = covariate(plan, valid, w)
    d = adjust(raw, x)
    evidence = _evidence(plan, plan.sigma, plan.alpha.better)
    better, harm = evidence.log_e_better(d), _evidence(plan, plan.sigma, plan.alpha.harm).log_e_harm(d)
    found = EvidenceFound(_last(better), _last(harm), math.log(1 / plan.alpha.better), math.log(1 / plan.alpha.harm))
    difference = _difference(evidence, d, w)
    strata = load_strata(d, w, np.array([pair.load for pair in valid]), plan.load_bounds)
    guards = tuple(_guard(plan, valid, w, name) for name in plan.guards)
    validity = validity_of(plan, pairs, valid)
    word = _word(plan, len(valid), found, difference, strata, guards, validity, keys_suffice(plan, valid), ending)
    by_pair = iter(zip(raw.tolist(), x.tolist(), w.tolist(), better.tolist(), strict=True))
    judged = []
    latest = 0.0
    for pair in pairs:
        d_i, x_i, w_i, latest = (0.0, 0.0, 0.0, latest) if is_void(pair) else next(by_pair)
        judged.append(JudgedPair(pair, is_void(pair), d_i, x_i, w_i, latest))
    return Finding(
        verdict=word,
        sentence=_sentence(plan, word, len(valid), difference, strata, guards, validity, ending),
        stops=word not in ("running", "better-so-far", "mixed")
        or ending is not None
        or any(guard.breached for guard in guards),
        difference_pp=difference,
        evidence=found,
        n=_numbers(plan, pairs, valid),
        by_load=strata,
        by_group=tuple(_group(plan, valid, w, name) for name in plan.groups),
        guards=guards,
        validity=validity,
        pairs=tuple(judged),
    )


def load_strata(
    d: FloatArray, w: FloatArray, load: FloatArray, bounds: tuple[float, float, float]
) -> tuple[Stratum, ...]:
    """Mean and t of the adjusted differences in each load stratum; a variance is at least a quarter of all squares.

    Args:
        d, w, load: (n,) adjusted differences, their weights, offered load of each pair.
    """
    which = np.searchsorted(np.array(bounds), load, side="right")
    floor = float(np.mean(d * d)) / 4 if len(d) else 0.0
    strata = []
    for k, name in enumerate(STRATA):
        here = d[which == k]
        weight = w[which == k].sum()
        variance = max(float(np.var(here, ddof=1)) if len(here) > 1 else 0.0, floor)
        t = float(here.mean() / np.sqrt(variance / len(here))) if len(here) and variance > 0 else 0.0
        strata.append(Stratum(name, len(here), 100 * float(here.sum() / weight) if weight else 0.0, t))
    return tuple(strata)


def _word(
    plan: Plan,
    n: int,
    found: EvidenceFound,
    difference: Difference,
    strata: Sequence[Stratum],
    guards: Sequence[GuardFound],
    validity: Validity,
    keys_suffice: bool,
    ending: Ending | None,
) -> Word:
    """The first rule that holds, safety first."""
    ended_by = ending.reason if ending else None
    crossed = n >= FEWEST_PAIRS_TO_STOP and found.log_e_better >= found.better_needs and not plan.shared_queue
    if ended_by == "guard":
        return "stopped-by-guard"
    if validity.problems:
        return "not-measurable"
    if n >= FEWEST_PAIRS_TO_STOP and found.log_e_harm >= found.harm_needs:
        return "worse"
    if any(guard.breached for guard in guards):
        return "mixed" if crossed else "stopped-by-guard"
    covered = n >= FEWEST_PAIRS_FOR_BETTER and all(s.pairs >= FEWEST_PAIRS_A_STRATUM for s in strata)
    points_down = any(s.pairs >= FEWEST_PAIRS_A_STRATUM and s.t < CLEARLY_WORSE_T for s in strata)
    if crossed and covered and keys_suffice and not points_down:
        return "better"
    inside = -plan.margin_pp < difference.low and difference.high < plan.margin_pp
    if n >= FEWEST_PAIRS_TO_STOP and inside and not plan.shared_queue:
        return "no-difference"
    if ended_by == "user":
        return "stopped-by-user"
    if crossed:
        return "mixed" if points_down else "better-so-far"
    return "undecided" if ended_by == "time" else "running"


def _sentence(
    plan: Plan,
    word: Word,
    n: int,
    difference: Difference,
    strata: Sequence[Stratum],
    guards: Sequence[GuardFound],
    validity: Validity,
    ending: Ending | None,
) -> str:
    """The verdict for a reader who knows no statistics."""
    where = " in a half-size pool" if plan.design == "pools" else ""
    span = f"{difference.mean:+.1f} points ({difference.low:+.1f} to {difference.high:+.1f}){where}"
    down = [f"at load {s.stratum} %" for s in strata if s.pairs >= FEWEST_PAIRS_A_STRATUM and s.t < CLEARLY_WORSE_T]
    breached = [guard for guard in guards if guard.breached]
    if word == "running":
        if plan.shared_queue:
            return (
                f"Both strategies share one queue, so this can only show that B does no obvious damage: so far {span}."
            )
        to_go = n80(plan.effect_pp / 100, plan.sigma, plan.alpha.better) - n
        more = (
            f"; about {in_words(to_go * plan.pair_s / 3600)} more to see {plan.effect_pp:g} points" if to_go > 0 else ""
        )
        return f"No verdict yet: so far {span}{more}."
    if word == "better-so-far":
        missing = [f"load {s.stratum} %" for s in strata if s.pairs < FEWEST_PAIRS_A_STRATUM]
        lacks = f"too few pairs at {', '.join(missing)}" if missing else "too few pairs or sessions to call it"
        return f"Better at the load seen so far, {span}; {lacks}."
    if word == "better":
        return f"B met the targets more often: {span}."
    if word == "mixed":
        return f"Better overall, {span}, worse for {', '.join([g.name for g in breached] + down)}: your call."
    if word == "worse":
        return f"Stopped: B does harm, {span}. The champion is back."
    if word == "stopped-by-guard":
        acted = [f"{g.name} {g.challenger:.4g} against the champion's {g.champion:.4g}" for g in breached]
        if ending and ending.breach:
            acted = [f"{ending.breach.name} {ending.breach.measured:.4g}, allowed {ending.breach.limit:.4g}"]
        return f"Stopped by a guard: {', '.join(acted)}. The champion is back."
    if word == "no-difference":
        return f"Any difference is smaller than {plan.margin_pp:g} point{'' if plan.margin_pp == 1 else 's'}{where}."
    if word == "undecided":
        largest = max(abs(difference.low), abs(difference.high))
        return (
            f"Not enough evidence in {plan.max_hours:g} h; smaller than about {largest:.0f} points{where}, if anything."
        )
    if word == "not-measurable":
        return f"Not measurable: {'; '.join(validity.problems)}."
    return f"Stopped by the operator at {span}: the interval is valid as it stands."


def _evidence(plan: Plan, sigma: float, alpha: float) -> Evidence:
    return GaussianMixture(sigma, alpha) if plan.design == "sticky" else SignFlips(sigma)


def _difference(evidence: Evidence, d: FloatArray, w: FloatArray) -> Difference:
    low, high = evidence.interval(d, w)
    mean = float(d.sum() / w.sum()) if w.any() else 0.0
    return Difference(100 * mean, 100 * low, 100 * high)


def _last(path: FloatArray) -> float:
    return float(path[-1]) if len(path) else 0.0


def _guard(plan: Plan, pairs: Sequence[Pair], w: FloatArray, name: str) -> GuardFound:
    alpha = plan.alpha.guards / len(plan.guards)
    d = differences(plan, pairs, w, name)
    log_e = _last(_evidence(plan, plan.guards[name], alpha).log_e_harm(-d))
    needs = math.log(1 / alpha)
    breached = len(pairs) >= FEWEST_PAIRS_TO_STOP and log_e >= needs
    return GuardFound(name, *shares_by_arm(plan, pairs, name), log_e, needs, breached)


def _group(plan: Plan, pairs: Sequence[Pair], w: FloatArray, name: str) -> GroupFound:
    d = differences(plan, pairs, w, name)
    seen = np.array([bool(pair.first.share(name)[1] and pair.second.share(name)[1]) for pair in pairs])
    evidence = _evidence(plan, plan.groups[name], plan.alpha.better)
    return GroupFound(name, *shares_by_arm(plan, pairs, name), _difference(evidence, d, w * seen))


def _numbers(plan: Plan, pairs: Sequence[Pair], valid: Sequence[Pair]) -> Numbers:
    champion = challenger = unresolved = 0
    for pair in valid:
        a, b = by_arm(plan, pair)
        champion, challenger = champion + a.counted, challenger + b.counted
        unresolved += a.unresolved + b.unresolved
    return Numbers(len(valid), len(pairs) - len(valid), champion, challenger, unresolved)
