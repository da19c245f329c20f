"""Whether the figures of an experiment mean what they say: fair coins, equal arrivals, the right arm, no carry-over."""

import math
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from scipy.stats import binomtest, norm

from kairos.scheduler_core.service.experiments.design import Pair, Plan, coin
from kairos.scheduler_core.service.experiments.sequence import by_arm, signs
from kairos.scheduler_core.slo import BoolArray, FloatArray

LARGEST_VOID_SHARE = 0.05
CONTAMINATION_FLAG = 0.1
CONTAMINATION_LIMIT = 0.3
SMALLEST_CHECK_P = 0.001
CARRY_OVER_FLAG_P = 0.1
CARRY_OVER_DRAWS = 1999
FEWEST_FOLLOWERS = 4
"""First blocks after their own arm, and after the other, that a carry-over check needs."""
FEWEST_EFFECTIVE_KEYS = 30.0


class Validity(msgspec.Struct, frozen=True):
    """What could make the figures mean something else. `problems` refuse a verdict, `flags` do not."""

    contamination_share: float
    carry_over_p: float | None
    """None: too few pairs to say, or no switches."""
    coin_p: float
    counts_p: float
    wrong_arm_share: float
    replay_bias_pp: float | None
    problems: tuple[str, ...]
    flags: tuple[str, ...]


def keys_suffice(plan: Plan, pairs: Sequence[Pair]) -> bool:
    """Whether each arm of `sticky` saw enough sessions, big ones counted less: (sum w)^2 / sum w^2."""
    if plan.design != "sticky":
        return True
    for sides in ([pair.first for pair in pairs], [pair.second for pair in pairs]):
        squares = sum(side.squares for side in sides)
        if not squares or sum(side.counted for side in sides) ** 2 / squares < FEWEST_EFFECTIVE_KEYS:
            return False
    return True


def validity_of(plan: Plan, pairs: Sequence[Pair], valid: Sequence[Pair]) -> Validity:
    """Every check; `valid` are the pairs that are not void."""
    sides = [side for pair in valid for side in (pair.first, pair.second)]
    counted = sum(side.counted for side in sides)
    contamination = sum(side.contaminated for side in sides) / counted if counted else 0.0
    decisions = sum(side.decisions for side in sides)
    wrong = sum(side.wrong_arm for side in sides) / decisions if decisions else 0.0
    void = len(pairs) - len(valid)
    coin_p, counts_p = _coin_p(plan, pairs), _counts_p(plan, valid)
    carry_over_p = _carry_over_p(plan, valid)
    problems, flags = [], []
    if contamination > CONTAMINATION_LIMIT:
        problems.append(
            f"{contamination:.0%} of requests waited for the other strategy's work; use longer blocks or pools"
        )
    elif contamination > CONTAMINATION_FLAG:
        flags.append(f"{contamination:.0%} of requests waited for the other strategy's work: the size is blurred")
    if void > max(1.0, LARGEST_VOID_SHARE * len(pairs)):
        problems.append(f"{void} of {len(pairs)} pairs ran the wrong strategy; mend the switching of the data planes")
    if coin_p <= SMALLEST_CHECK_P:
        problems.append(f"the coins do not look fair (p {coin_p:.1g}); check who draws them")
    if counts_p <= SMALLEST_CHECK_P:
        if plan.covariate_before_pair:
            flags.append(f"arrivals depend on the arm (p {counts_p:.1g}): clients react")
        else:
            problems.append(
                f"arrivals depend on the arm (p {counts_p:.1g}); clients react: take the covariate before the pair"
            )
    if carry_over_p is not None and carry_over_p < CARRY_OVER_FLAG_P:
        flags.append(f"a block depends on the strategy before it (p {carry_over_p:.2g}): double the block")
    bias = _replay_bias_pp(plan, valid)
    return Validity(contamination, carry_over_p, coin_p, counts_p, wrong, bias, tuple(problems), tuple(flags))


def _coin_p(plan: Plan, pairs: Sequence[Pair]) -> float:
    """Whether coins (`sticky`: sessions per arm) are as balanced as chance makes them."""
    if not pairs:
        return 1.0
    if plan.design != "sticky":
        return float(binomtest(sum(coin(plan, pair.i) > 0 for pair in pairs), len(pairs)).pvalue)
    surplus = variance = 0.0
    for pair in pairs:
        sessions = pair.first.sessions + pair.second.sessions
        surplus += pair.first.sessions - sessions * pair.share
        variance += sessions * pair.share * (1 - pair.share)
    return float(2 * norm.sf(abs(surplus) / math.sqrt(variance))) if variance else 1.0


def _counts_p(plan: Plan, pairs: Sequence[Pair]) -> float:
    """Bound on the chance of so uneven counts per arm if arrivals ignore the arm (Hoeffding, given fair signs)."""
    if plan.design == "sticky":
        return 1.0
    uneven = np.array(
        [(p.first.counted - p.second.counted) / max(p.first.counted + p.second.counted, 1) for p in pairs]
    )
    squares = float((uneven**2).sum())
    return min(1.0, 2 * math.exp(-(float(uneven @ signs(plan, pairs)) ** 2) / (2 * squares))) if squares else 1.0


def _carry_over_p(plan: Plan, pairs: Sequence[Pair]) -> float | None:
    """Permutation test: do first blocks differ by whether they follow their own arm or the other?

    Attainment without what the covariate and the arm explain; which arm went before is a coin of its own. That holds
    where one pair follows another at half share; below it the champion always goes before.
    """
    joined = [
        (before, pair)
        for before, pair in pairwise(pairs)
        if plan.design == "switchback" and before.i == pair.i - 1 and min(before.share, pair.share) >= 0.5
    ]
    own = np.array([coin(plan, before.i) != coin(plan, pair.i) for before, pair in joined], dtype=np.bool_)
    if min(own.sum(), (~own).sum()) < FEWEST_FOLLOWERS:
        return None
    later = [pair for _, pair in joined]
    y = np.array([pair.first.attainment if pair.first.counted else 0.0 for pair in later])
    explained = [np.ones(len(later)), signs(plan, later)]
    if all(pair.first.replayed is not None for pair in later):
        explained.append(np.array([pair.first.replayed for pair in later], dtype=np.float64))
    design = np.stack(explained, axis=1)
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]

    def contrast(own: BoolArray) -> FloatArray:
        """(...,) from (..., n)."""
        gap: FloatArray = (own @ rest) / own.sum(axis=-1) - (~own @ rest) / (~own).sum(axis=-1)
        return np.abs(gap)

    shuffled = own[np.random.default_rng(plan.seed).random((CARRY_OVER_DRAWS, len(own))).argsort(axis=1)]
    as_extreme = int((contrast(shuffled) >= contrast(own) - 1e-12).sum())
    return (1 + as_extreme) / (1 + CARRY_OVER_DRAWS)


def _replay_bias_pp(plan: Plan, pairs: Sequence[Pair]) -> float | None:
    """Replayed minus real champion, in points over its blocks; None without replays."""
    champions = [by_arm(plan, pair)[0] for pair in pairs]
    gaps = [side.replayed - side.attainment for side in champions if side.counted and side.replayed is not None]
    return 100 * float(np.mean(gaps)) if gaps else None
