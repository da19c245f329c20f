"""Plans and pairs made by hand or by a seed, for the tests of experiments."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kairos.scheduler_core.service.experiments.design import Design, Lengths, Pair, Plan, Side, Stage, coin

HALF = (Stage(0.5, None),)
LENGTHS = Lengths(block_s=300.0, burn_s=60.0, tail_s=8.0, settle_s=20.0, drain_p90_s=60.0)


def plan(design: Design = "switchback", **changes: object) -> Plan:
    fields: dict[str, object] = dict(
        id="exp_01",
        design=design,
        champion="s1@4",
        challenger="s2@1",
        lengths=LENGTHS,
        sigma=0.05,
        requests_per_pair=2000.0,
        load_bounds=(0.5, 0.75, 0.9),
        seed=7,
        max_hours=20.0,
        fixed_at="2026-08-01T05:00:00Z",
        stages=HALF,
    )
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


def pair(
    of: Plan,
    i: int,
    champion_met: int = 900,
    challenger_met: int = 900,
    load: float = 0.3,
    counted: int = 1000,
    **sides: Any,
) -> Pair:
    """Pair i with the requests of each arm on the side where the coin put it.

    Args:
        sides: further fields of `Side`, each a function of the side's arm.
    """

    def side(arm: str) -> Side:
        met = challenger_met if arm == "B" else champion_met
        return Side(counted=counted, met=met, **{name: of_arm(arm) for name, of_arm in sides.items()})

    first = "B" if of.design == "sticky" or coin(of, i) > 0 else "A"
    return Pair(i=i, first=side(first), second=side("A" if first == "B" else "B"), load=load, share=0.5)


LOADS = (0.3, 0.6, 0.8, 0.95)


def pairs(of: Plan, n: int, gain: int, loads: Sequence[float] = LOADS, **sides: Any) -> list[Pair]:
    """n pairs in which the challenger meets `gain` more of each 1,000 targets, a little more or less by turns."""
    wobble = (-20, 20, -10, 10, 0)
    return [pair(of, i, 800, 800 + gain + wobble[i % len(wobble)], loads[i % len(loads)], **sides) for i in range(n)]


def drawn_pairs(of: Plan, n: int, gain: float, seed: int) -> list[Pair]:
    """n pairs of random attainment around 0.8 with a replay that knows most of it; the challenger adds `gain`."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        attainment = np.clip(0.8 + 0.08 * rng.standard_normal(2), 0.0, 1.0)
        replay = np.clip(attainment + 0.02 * rng.standard_normal(2), 0.0, 1.0)
        b = 0 if of.design == "sticky" or coin(of, i) > 0 else 1
        attainment[b] = np.clip(attainment[b] + gain, 0.0, 1.0)
        counted = rng.integers(800, 1200, 2)
        sides = [
            Side(
                counted=int(counted[k]),
                met=int(rng.binomial(counted[k], attainment[k])),
                replayed=float(replay[k]),
                contaminated=int(counted[k] * 0.02),
                decisions=1000,
                wrong_arm=0,
                sessions=200,
                squares=int(counted[k] ** 2 / 200),
                shares={
                    "error rate": (int(rng.binomial(counted[k], 0.01)), int(counted[k])),
                    "class chat": (int(rng.binomial(counted[k] // 2, attainment[k])), int(counted[k] // 2)),
                },
            )
            for k in range(2)
        ]
        made.append(Pair(i=i, first=sides[0], second=sides[1], load=LOADS[i % 4], share=0.5))
    return made
