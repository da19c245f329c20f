"""What an experiment will cost before it starts: pairs, hours, and the smallest effect that a time can show.

Effects (`effect`, `sigma`) are shares: 0.05 is 5 points. Source: docs/statistics.md.
"""

import math

from kairos.scheduler_core.service.experiments.design import Plan

FEWEST_PAIRS_TO_STOP = 8
FEWEST_PAIRS_FOR_BETTER = 20
PRICED_EFFECTS_PP = (5, 2, 1)


def n50(effect: float, sigma: float, alpha: float) -> float:
    """Pairs until half of all experiments with this true effect have a verdict."""
    return 2.0 * (math.log(1.0 / alpha) + 0.5) * (1.0 + (sigma / effect) ** 2)


def n80(effect: float, sigma: float, alpha: float) -> float:
    """Pairs until four fifths of all experiments with this true effect have a verdict."""
    return 1.5 * n50(effect, sigma, alpha)


def smallest_effect(pairs: float, sigma: float, alpha: float) -> float:
    """The effect that four fifths of experiments of so many pairs find; infinite with too few pairs for any."""
    ratio = pairs / (3.0 * (math.log(1.0 / alpha) + 0.5)) - 1.0
    return sigma / math.sqrt(ratio) if ratio > 0.0 else math.inf


def hours(plan: Plan, effect: float) -> float:
    """Hours at full share until four fifths of all experiments with this true effect have a verdict."""
    pairs = max(n80(effect, plan.sigma, plan.alpha.better), FEWEST_PAIRS_FOR_BETTER)
    return pairs * plan.pair_s / 3600.0


def price(plan: Plan) -> str:
    """What each effect costs, in words: `5 points: 7 h; 2 points: 31 h; 1 point: 5 days`."""
    return "; ".join(
        f"{points} point{'s' if points > 1 else ''}: {in_words(hours(plan, points / 100.0))}"
        for points in PRICED_EFFECTS_PP
    )


def in_words(duration_h: float) -> str:
    """Hours below two days, days above.

    >>> in_words(30.8), in_words(116.5)
    ('31 h', '5 days')
    """
    return f"{duration_h:.0f} h" if duration_h < 48.0 else f"{duration_h / 24.0:.0f} days"
