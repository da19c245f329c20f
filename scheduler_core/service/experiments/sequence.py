"""From observed pairs to one signed difference per coin, challenger minus champion: what the test reads.

Arrays are (n,), one entry a pair, in order.
"""

from collections.abc import Sequence

import numpy as np

from kairos.scheduler_core.service.experiments.design import Pair, Plan, Side, coin
from kairos.scheduler_core.slo import FloatArray

HEAVIEST_PAIR = 3.0
VOID_WRONG_SHARE = 0.01


def is_void(pair: Pair) -> bool:
    """Whether a side was served by the wrong strategy too often to count."""
    return any(side.wrong_arm > VOID_WRONG_SHARE * side.decisions for side in (pair.first, pair.second))


def signs(plan: Plan, pairs: Sequence[Pair]) -> FloatArray:
    """(n,) +1 where the first side is the challenger's."""
    return np.array([1.0 if plan.design == "sticky" else float(coin(plan, pair.i)) for pair in pairs])


def weights(plan: Plan, pairs: Sequence[Pair]) -> FloatArray:
    """(n,) by counted requests, the same for both arms; 0 where a side saw none."""
    return np.array([_weight(plan, pair) for pair in pairs])


def _weight(plan: Plan, pair: Pair) -> float:
    if plan.design == "sticky":
        return 1.0 if pair.first.counted + pair.second.counted else 0.0
    if not pair.first.counted or not pair.second.counted:
        return 0.0
    return min((pair.first.counted + pair.second.counted) / plan.requests_per_pair, HEAVIEST_PAIR)


def differences(plan: Plan, pairs: Sequence[Pair], w: FloatArray, name: str | None = None) -> FloatArray:
    """(n,) weighted challenger minus champion of a guard's or group's share; None: of attainment."""
    d = np.zeros(len(pairs))
    for k, pair in enumerate(pairs):
        (hits_1, n_1), (hits_2, n_2) = pair.first.share(name), pair.second.share(name)
        if plan.design == "sticky" and n_1 + n_2:
            pooled = (hits_1 + hits_2) / (n_1 + n_2)
            d[k] = (hits_1 - pooled * n_1) / ((n_1 + n_2) * pair.share * (1 - pair.share))
        elif plan.design != "sticky" and n_1 and n_2:
            d[k] = hits_1 / n_1 - hits_2 / n_2
    return d * w * signs(plan, pairs)


def covariate(plan: Plan, pairs: Sequence[Pair], w: FloatArray) -> FloatArray:
    """(n,) weighted difference of the covariate, with the coin; 0 where there is none."""
    x = np.zeros(len(pairs))
    for k, pair in enumerate(pairs):
        if plan.design == "sticky":
            continue
        if plan.covariate == "offered":
            x[k] = (pair.first.offered - pair.second.offered) / max(pair.first.offered + pair.second.offered, 1.0)
        elif pair.first.replayed is not None and pair.second.replayed is not None:
            x[k] = pair.first.replayed - pair.second.replayed
    return x * w * signs(plan, pairs)


def by_arm(plan: Plan, pair: Pair) -> tuple[Side, Side]:
    """(champion's, challenger's)."""
    first_is_b = plan.design == "sticky" or coin(plan, pair.i) > 0
    return (pair.second, pair.first) if first_is_b else (pair.first, pair.second)


def shares_by_arm(plan: Plan, pairs: Sequence[Pair], name: str) -> tuple[float, float]:
    """Share of hits over all pairs, (champion's, challenger's)."""
    hits, counted = np.zeros(2), np.zeros(2)
    for pair in pairs:
        for arm, side in enumerate(by_arm(plan, pair)):
            hits[arm] += side.share(name)[0]
            counted[arm] += side.share(name)[1]
    champion, challenger = hits / np.maximum(counted, 1)
    return float(champion), float(challenger)
