"""Whether the verdicts of live experiments can be trusted: the whole pipeline on simulated blocks.

    KAIROS_DATA=... python benchmarks/experiments_validity.py [--quick]

Blocks come from `experiment_blocks.py`: both arms in each block, after each arm. Loads are drawn from a stretch's
blocks in runs of 40 on average, coins over them; `judge` is asked after every pair at which it could end an experiment.
Prints each pass mark and ends with 1 when one is missed. Writes results/experiments_validity.json.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiment_blocks import (
    LENGTHS,
    SLOWER,
    Blocks,
    block_of,
    blocks_of,
    drain_of,
    guard_acts,
    planned_lengths,
    ran,
    share_for,
    stretch,
)
from msgspec.structs import replace
from numpy.typing import NDArray
from record import meta
from scipy.stats import norm, ttest_ind

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.service.experiments.design import Pair, Plan, Side, Stage, coin, lengths_for
from kairos.scheduler_core.service.experiments.evidence import SignFlips, adjust, sigma_of
from kairos.scheduler_core.service.experiments.planner import FEWEST_PAIRS_FOR_BETTER, FEWEST_PAIRS_TO_STOP, n50
from kairos.scheduler_core.service.experiments.verdict import FEWEST_PAIRS_A_STRATUM, judge
from kairos.scheduler_core.slo import FloatArray

SEED = 0
PAIRS = 120
LOADS = (0.5, 0.8, 0.95)
BUSY = {"mooncake_conversation": 0.7, "azure2023_code": 0.4, "azure2023_conv": 0.7, "servegen_r1_resampled": 0.7}
"""Load of the cells with an effect: the champion misses some targets, and blocks can be long enough for its queue."""
SHOWN = "mooncake_conversation"
"""The trace of what needs only one."""
POINTS = (2, 5, 10, 20)
COINS = 10
OUT = Path(__file__).parent / "results" / "experiments_validity.json"

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How much is simulated and how often coins are drawn over it."""

    equal_blocks: int = 144
    effect_blocks: int = 72
    equal_loads: int = 20
    effect_loads: int = 20
    guard_blocks: int = 6
    overloads: int = 3


QUICK = Size(24, 24, 2, 2, 3, 1)

Rows = list[dict[str, object]]
Mark = tuple[str, float, str, float]
"""What, found, `<=` or `>=`, wanted."""

PLAN = Plan(
    id="history",
    design="switchback",
    champion="a@1",
    challenger="b@1",
    lengths=LENGTHS,
    sigma=1.0,
    requests_per_pair=1.0,
    load_bounds=(0.0, 0.0, 0.0),
    seed=SEED,
    max_hours=PAIRS * 2 * LENGTHS.block_s / 3600,
    fixed_at="2026-08-01T05:00:00Z",
    stages=(Stage(0.5, None),),
)


class Trial:
    """An experiment on blocks: one load, one sequence of coins."""

    def __init__(self, plan: Plan, blocks: Blocks, chosen: IntArray, cuped: bool = True) -> None:
        self.plan, self.blocks, self.cuped = plan, blocks, cuped
        self.first, self.second = chosen[0::2], chosen[1::2]
        n = len(self.first)
        self.c = np.array([coin(plan, i) for i in range(n)])
        first_is_b = (self.c > 0).astype(np.int64)
        before_first = np.concatenate([[0], 1 - first_is_b[:-1]])
        self.met = (
            blocks.met[before_first, first_is_b, self.first],
            blocks.met[first_is_b, 1 - first_is_b, self.second],
        )
        counted = blocks.counted[self.first], blocks.counted[self.second]
        seen = (counted[0] > 0) & (counted[1] > 0)
        self.w = np.where(seen, np.minimum((counted[0] + counted[1]) / plan.requests_per_pair, 3.0), 0.0)
        share = [met / np.maximum(count, 1) for met, count in zip(self.met, counted, strict=True)]
        self.raw = self.w * self.c * (share[0] - share[1])
        x = blocks.replayed[self.first] - blocks.replayed[self.second]
        self.d = adjust(self.raw, self.w * self.c * x) if cuped else self.raw
        evidence = SignFlips(plan.sigma)
        self.for_better, self.for_harm = evidence.log_e_better(self.d), evidence.log_e_harm(self.d)

    def crossed(self) -> int | None:
        """Pairs until a boundary is crossed."""
        need = math.log(1 / self.plan.alpha.better)
        over = np.maximum(self.for_better, self.for_harm)[FEWEST_PAIRS_TO_STOP - 1 :] >= need
        return int(over.argmax()) + FEWEST_PAIRS_TO_STOP if over.any() else None

    def stops(self) -> tuple[str, int]:
        """(word, pairs) at which it ends `better` or `worse`; ("none", all pairs) otherwise."""
        need = math.log(1 / self.plan.alpha.better)
        strata = np.searchsorted(np.array(self.plan.load_bounds), self.blocks.load[self.first], side="right")
        covered = np.min([np.cumsum(strata == k) for k in range(4)], axis=0) >= FEWEST_PAIRS_A_STRATUM
        for n in range(FEWEST_PAIRS_TO_STOP, len(self.d) + 1):
            might_be_better = n >= FEWEST_PAIRS_FOR_BETTER and covered[n - 1] and self.for_better[n - 1] >= need
            if might_be_better or self.for_harm[n - 1] >= need:
                word = judge(self.plan, self.pairs(n)).verdict
                if word in ("better", "worse"):
                    return word, n
        return "none", len(self.d)

    def pairs(self, n: int) -> list[Pair]:
        """The first n, as the service observes them."""

        def side(block: int, met: int) -> Side:
            replayed = float(self.blocks.replayed[block]) if self.cuped else None
            return Side(counted=int(self.blocks.counted[block]), met=int(met), replayed=replayed)

        return [
            Pair(
                i=i,
                first=side(self.first[i], self.met[0][i]),
                second=side(self.second[i], self.met[1][i]),
                load=float(self.blocks.load[self.first[i]]),
                share=0.5,
            )
            for i in range(n)
        ]

    def truth(self) -> FloatArray:
        """(n,) running weighted mean of what each pair would gain if both of its blocks ran the challenger."""
        gain = (self.blocks.met[1, 1] - self.blocks.met[0, 0]) / np.maximum(self.blocks.counted, 1)
        of_pair = (gain[self.first] + gain[self.second]) / 2
        truth: FloatArray = np.cumsum(self.w * of_pair) / np.maximum(np.cumsum(self.w), 1e-12)
        return truth

    def covered(self) -> bool:
        """Whether the 95 % interval held the truth at every look."""
        evidence, truth, n = SignFlips(self.plan.sigma), self.truth(), len(self.d)
        left = self.d - self.w * truth[:, None]
        looks = np.arange(FEWEST_PAIRS_TO_STOP - 1, n)
        against = [evidence.log_e_better(side * left[looks])[np.arange(len(looks)), looks] for side in (1.0, -1.0)]
        return bool(np.max(against) < math.log(40.0))

    def t_test_alarms(self) -> bool:
        """Whether a t-test at each look would have called a difference."""
        n = np.arange(2, len(self.d) + 1)
        mean = np.cumsum(self.d)[1:] / n
        sd = np.sqrt(np.maximum(np.cumsum(self.d**2)[1:] / n - mean**2, 1e-12) * n / (n - 1))
        return bool((np.abs(mean / sd * np.sqrt(n))[FEWEST_PAIRS_TO_STOP - 2 :] > 1.96).any())


def trials(name: str, blocks: Blocks, loads: int, cuped: bool = True) -> list[Trial]:
    """So many loads with ten sequences of coins each."""
    rng = np.random.default_rng(SEED)
    plan = plan_from_history(blocks, cuped)
    drawn = [load_drawn(rng, len(blocks.counted)) for _ in range(loads)]
    return [
        Trial(replace(plan, id=f"{name}/{k}/{toss}"), blocks, chosen, cuped)
        for k, chosen in enumerate(drawn)
        for toss in range(COINS)
    ]


def plan_from_history(blocks: Blocks, cuped: bool) -> Plan:
    """What a plan fixes, from the champion alone."""
    first, second = np.arange(0, len(blocks.counted), 2), np.arange(1, len(blocks.counted), 2)
    counted = blocks.counted[first] + blocks.counted[second]
    plan = replace(
        PLAN,
        lengths=blocks.lengths,
        max_hours=PAIRS * 2 * blocks.lengths.block_s / 3600,
        requests_per_pair=float(counted.mean()),
        load_bounds=tuple(np.quantile(blocks.load, (0.5, 0.75, 0.9)).tolist()),
    )
    share = blocks.met[0, 0] / np.maximum(blocks.counted, 1)
    w = np.minimum(counted / plan.requests_per_pair, 3.0) * np.minimum(
        blocks.counted[first], blocks.counted[second]
    ).clip(0, 1)
    x = w * (blocks.replayed[first] - blocks.replayed[second]) * cuped
    return replace(plan, sigma=sigma_of(w * (share[first] - share[second]), x))


def load_drawn(rng: np.random.Generator, blocks: int) -> IntArray:
    """(2 * PAIRS,) blocks of a load: runs of neighbouring pairs, 20 pairs on average."""
    chosen: list[int] = []
    while len(chosen) < 2 * PAIRS:
        start, length = 2 * int(rng.integers(blocks // 2)), 2 * int(rng.geometric(1 / 20))
        chosen += [(start + k) % blocks for k in range(length)]
    return np.array(chosen[: 2 * PAIRS])


def main() -> int:
    """Measure, write, print; the number of marks missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few blocks and coins; nothing is written")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)  # a policy raises on purpose
    began_s = time.monotonic()
    size = QUICK if quick else Size()
    parts: dict[str, Rows] = {}
    parts["equal"], marks = equal(size)
    parts["gains"], parts["harm"], more = effects(size)
    marks += more
    for name, (rows, more) in {
        "weak null": weak_null(size),
        "refusals and guards": refusals(size),
        "negative controls": controls(size),
    }.items():
        parts[name] = rows
        marks += more
    for name, rows in parts.items():
        print(f"\n{name}")
        show(rows)
    told = [
        {"mark": w, "found": round(f, 3), "wanted": f"{s} {limit:g}", "met": met(f, s, limit)}
        for w, f, s, limit in marks
    ]
    print()
    show(told)
    if not quick:
        made = meta("python benchmarks/experiments_validity.py", [SEED])
        made["took_s"] = round(time.monotonic() - began_s)
        OUT.write_text(json.dumps({"meta": made, "marks": told, **parts}, indent=1) + "\n")
    return sum(not row["met"] for row in told)


def met(found: float, sense: str, limit: float) -> bool:
    """Whether a mark is met."""
    return found <= limit if sense == "<=" else found >= limit


def show(rows: Rows) -> None:
    """As a table."""
    for k, row in enumerate(rows):
        if not k or row.keys() != rows[k - 1].keys():
            print(" | ".join(row))
        print(" | ".join("-" if value is None else str(value) for value in row.values()))


# --- equal strategies ------------------------------------------------------------------------------------------------


def equal(size: Size) -> tuple[Rows, list[Mark]]:
    """False verdicts between equal strategies, and what a t-test at each look makes of the same pairs."""
    rows: Rows = []
    for trace in SLOWER:
        for load in LOADS:
            blocks = blocks_of(trace, load, size.equal_blocks, SEED, 0.0, 0.0)
            for cuped in (True, False):
                rows.append(
                    equal_row(f"{trace}, {load:g}", trials(f"{trace} {load}", blocks, size.equal_loads, cuped), cuped)
                )
    blocks = blocks_of(SHOWN, BUSY[SHOWN], size.effect_blocks, SEED, 0.0, 0.0)
    for name, strange in (
        ("noise of t with 3 degrees, growing fourfold", heavy(blocks)),
        ("data planes 2 s apart", skewed(blocks, size)),
    ):
        rows.append(equal_row(name, trials(name, strange, size.equal_loads), True))
    worst = max(float(str(row["false %"])) for row in rows)
    return rows, [("false verdicts between equal strategies, worst cell, %", worst, "<=", 5.0)]


def equal_row(name: str, found: Sequence[Trial], cuped: bool) -> dict[str, object]:
    """One cell."""
    words = [trial.stops()[0] for trial in found]
    return {
        "cell": name,
        "replay": cuped,
        "runs": len(found),
        "sigma": round(found[0].plan.sigma, 4),
        "attained %": round(100 * float(found[0].blocks.met[0, 0].sum() / found[0].blocks.counted.sum()), 1),
        "better %": percent(word == "better" for word in words),
        "worse %": percent(word == "worse" for word in words),
        "false %": percent(word != "none" for word in words),
        "t-test at each look %": percent(trial.t_test_alarms() for trial in found),
    }


def heavy(blocks: Blocks) -> Blocks:
    """The same blocks with heavy-tailed noise whose scale drifts."""
    rng = np.random.default_rng(SEED)
    n = len(blocks.counted)
    noise = 0.03 * rng.standard_t(3, n) * np.linspace(0.5, 2.0, n)
    met = np.clip(blocks.met[0, 0] + blocks.counted * noise, 0, blocks.counted).astype(np.int64)
    return dataclasses.replace(blocks, met=np.broadcast_to(met, (2, 2, n)))


def skewed(blocks: Blocks, size: Size) -> Blocks:
    """The same blocks where every other request's data plane is 2 s late."""
    workload = stretch(SHOWN, BUSY[SHOWN], size.effect_blocks * LENGTHS.block_s, SEED)
    met, _ = ran(SHOWN, BUSY[SHOWN], size.effect_blocks, SEED, (0.0,))
    block, counts = block_of(workload.arrival_s + 2.0 * (np.arange(len(met)) % 2))
    n = len(blocks.counted)
    kept = counts & (block < n)
    counted = np.bincount(block[kept], minlength=n)
    hits = np.bincount(block[kept], weights=met[kept], minlength=n).astype(np.int64)
    return dataclasses.replace(blocks, counted=counted, met=np.broadcast_to(hits, (2, 2, n)))


# --- gains and harm --------------------------------------------------------------------------------------------------


def effects(size: Size) -> tuple[Rows, Rows, list[Mark]]:
    """Gains by a tunable policy, and the same policies as champions of a challenger that does harm."""
    gains: Rows = []
    harm: Rows = []
    for trace in SLOWER:
        lengths = planned_lengths(trace, BUSY[trace], size.effect_blocks, SEED)
        for points in POINTS:
            share = share_for(points, trace, BUSY[trace], size.effect_blocks, SEED, lengths)
            if share is None:
                continue
            better = blocks_of(trace, BUSY[trace], size.effect_blocks, SEED, 0.0, share, lengths)
            worse = blocks_of(trace, BUSY[trace], size.effect_blocks, SEED, share, 0.0, lengths)
            gains.append(gain_row(trace, points, trials(f"{trace} {points}", better, size.effect_loads)))
            harm.append(harm_row(trace, -points, trials(f"{trace} {-points}", worse, size.effect_loads)))
    wrong = [float(str(row["worse %"])) for row in gains] + [float(str(row["better %"])) for row in harm]
    off = [float(str(row["found / planned"])) for row in gains if row["found / planned"] is not None]
    drained = [float(str(row["estimate / true"])) for row in gains]
    covered = [float(str(row["interval holds %"])) for row in gains + harm]
    late = [float(str(row["pairs: median"])) for row in harm if row["points"] == -10]
    return (
        gains,
        harm,
        [
            ("verdicts of the wrong sign, mean over cells, %", float(np.mean(wrong)), "<=", 0.5),
            ("pairs to cross against the planner's, median cell", float(np.median(off)), "<=", 1.5),
            (
                "estimate / true, worst cell from 2 points",
                min(drained),
                ">=",
                0.9,
            ),
            ("interval holds the truth at every look, mean over cells, %", float(np.mean(covered)), ">=", 95.0),
            ("pairs until harm of 10 points is found, median, worst trace", max(late), "<=", 35.0),
        ],
    )


def common(trace: str, points: int, found: Sequence[Trial]) -> dict[str, object]:
    """What both tables say of a cell."""
    truth = np.array([trial.truth()[-1] for trial in found])
    seen = np.array([trial.d.sum() / trial.w.sum() for trial in found])
    return {
        "trace": trace,
        "points": points,
        "true": round(100 * float(truth.mean()), 2),
        "runs": len(found),
        "sigma": round(found[0].plan.sigma, 4),
        "drain s": round(found[0].blocks.drain_p90_s),
        "block s": round(found[0].blocks.lengths.block_s),
        "estimate / true": round(float(seen.mean() / truth.mean()), 3),
        "interval holds %": percent(trial.covered() for trial in found),
    }


def gain_row(trace: str, points: int, found: Sequence[Trial]) -> dict[str, object]:
    """One cell of gains."""
    stops = [trial.stops() for trial in found]
    planned = n50(max(float(np.mean([t.truth()[-1] for t in found])), 1e-3), found[0].plan.sigma, PLAN.alpha.better)
    crossed = median([trial.crossed() for trial in found])
    better = median([n if word == "better" else None for word, n in stops])
    return {
        **common(trace, points, found),
        "better %": percent(word == "better" for word, _ in stops),
        "worse %": percent(word == "worse" for word, _ in stops),
        "crossed %": percent(trial.crossed() is not None for trial in found),
        "pairs to cross": crossed,
        "planned": round(planned),
        "found / planned": None if crossed is None else round(crossed / max(planned, FEWEST_PAIRS_TO_STOP), 2),
        "hours to better": None if better is None else round(better * found[0].plan.pair_s / 3600, 1),
    }


def harm_row(trace: str, points: int, found: Sequence[Trial]) -> dict[str, object]:
    """One cell of harm."""
    stops = [trial.stops() for trial in found]
    late = [n if word == "worse" else None for word, n in stops]
    return {
        **common(trace, points, found),
        "better %": percent(word == "better" for word, _ in stops),
        "worse %": percent(word == "worse" for word, _ in stops),
        "pairs: median": quantile(late, 0.5),
        "pairs: p90": quantile(late, 0.9),
        "requests served by it: median": median_requests(found, late),
    }


def median_requests(found: Sequence[Trial], late: Sequence[int | None]) -> float | None:
    """Counted requests that the harmful challenger served until it was stopped."""
    served = [
        None if n is None else int(np.where(t.c > 0, t.blocks.counted[t.first], t.blocks.counted[t.second])[:n].sum())
        for t, n in zip(found, late, strict=True)
    ]
    return median(served)


# --- a gain that is one only at the load seen ------------------------------------------------------------------------


def weak_null(size: Size) -> tuple[Rows, list[Mark]]:
    """Gains in the quiet nine tenths, as large a loss in all in the busiest tenth; with and without the strata rule."""
    rows: Rows = []
    for trace in SLOWER:
        equal_blocks = blocks_of(trace, BUSY[trace], size.effect_blocks, SEED, 0.0, 0.0)
        for gain, loss in ((2, -18), (5, -20)):
            found = trials(f"{trace} {gain}", by_load(equal_blocks, gain, loss), size.effect_loads)
            words = [trial.stops()[0] for trial in found]
            rows.append({
                "trace": trace,
                "effects": f"+{gain}, {loss}",
                "runs": len(found),
                "better %": percent(word == "better" for word in words),
                "crossed for better %": percent(
                    bool((t.for_better[FEWEST_PAIRS_TO_STOP - 1 :] >= math.log(50)).any()) for t in found
                ),
            })  # fmt: skip
    worst = max(float(str(row["better %"])) for row in rows)
    return rows, [("`better` though the mean effect is not positive, worst cell, %", worst, "<=", 2.0)]


def by_load(blocks: Blocks, gain: int, loss: int) -> Blocks:
    """The challenger's blocks changed by load alone: the busiest `gain / (gain - loss)` of them lose."""
    busy = blocks.load > np.quantile(blocks.load, 1 - gain / (gain - loss))
    champion = np.clip(blocks.met[0, 0] / np.maximum(blocks.counted, 1), -loss / 100, 1 - gain / 100)
    met = blocks.met.copy()
    met[:, 0] = (blocks.counted * champion).round()
    met[:, 1] = (blocks.counted * (champion + np.where(busy, loss, gain) / 100)).round()
    return dataclasses.replace(blocks, met=met)


# --- overload, guards, negative controls -----------------------------------------------------------------------------


def refusals(size: Size) -> tuple[Rows, list[Mark]]:
    """What lengths are refused at overload, and which absolute guards act in a bad challenger's first block."""
    rows: Rows = []
    refused = []
    for trace in SLOWER:
        for seed in range(size.overloads):
            refused.append(is_refused(drain_of(trace, 1.2, size.effect_blocks, seed)))
    rows.append(
        {"what": "load 1.2 is not measurable by switchback", "cases": len(refused), "share %": percent(refused)}
    )
    marks: list[Mark] = [("`not measurable` at load 1.2, %", percent(refused), ">=", 90.0)]
    for name, text in (
        ("a strategy that raises", "experiment_blocks:Raises+late+least-requests+continuous"),
        ("a strategy that starves", "fcfs+experiment_blocks:Starves+least-requests+continuous"),
        ("the champion itself", "fcfs+late+least-requests+continuous"),
    ):
        acted = [bool(g) for trace in SLOWER for g in guard_acts(text, trace, 0.5, size.guard_blocks, SEED)]
        rows.append(
            {"what": f"{name}: a guard acts in its first block", "cases": len(acted), "share %": percent(acted)}
        )
        itself = name == "the champion itself"
        marks.append(
            (
                f"{name}: a guard acts in its first block, %",
                percent(acted),
                "<=" if itself else ">=",
                0.0 if itself else 95.0,
            )
        )
    return rows, marks


def is_refused(drain_s: float) -> bool:
    """Whether no block is long enough."""
    try:
        lengths_for(drain_s, LENGTHS.tail_s, 60.0)
    except InputError:
        return True
    return False


def controls(size: Size) -> tuple[Rows, list[Mark]]:
    """Methods that must fail loudly; if one did not, this benchmark could not see a fault."""
    rng = np.random.default_rng(SEED)
    before_after, hashed = [], []
    for trace in SLOWER:
        blocks = blocks_of(trace, 0.8, size.equal_blocks, SEED, 0.0, 0.0)
        share = blocks.met[0, 0] / np.maximum(blocks.counted, 1)
        for _ in range(size.effect_loads):
            half = len(share) // 3
            start = int(rng.integers(len(share) - 2 * half))
            earlier, later = share[start : start + half], share[start + half : start + 2 * half]
            before_after.append(bool(ttest_ind(earlier, later).pvalue < 0.05))
        hashed += [tenants_hashed(rng, trace, size) for _ in range(size.effect_loads)]
    closed, unclosed = unclosed_estimates(size)
    found = {
        "before and after, t-test on a third of the blocks each: false differences, %": (percent(before_after), 5.0),
        "40 tenants hashed once, z-test at the end: false differences, %": (percent(hashed), 5.0),
        "verdict on unclosed blocks: the estimate is off by, points": (abs(unclosed - closed), 2.0),
    }
    rows: Rows = [{"what": what, "found": round(value, 2)} for what, (value, _) in found.items()]
    blocks = blocks_of(SHOWN, BUSY[SHOWN], size.effect_blocks, SEED, 0.0, 0.0)
    refitted = percent(refitted_crosses(trial) for trial in trials("refitted", blocks, size.effect_loads))
    rows.append({"what": "slope fitted on all pairs at each look: boundary crossed, %", "found": refitted})
    return rows, [(what, value, ">=", limit) for what, (value, limit) in found.items()]


def tenants_hashed(rng: np.random.Generator, trace: str, size: Size) -> bool:
    """Whether a z-test calls two halves of 40 tenants unequal, though one strategy served both."""
    met, _ = ran(trace, 0.8, size.equal_blocks, SEED, (0.0,))
    sessions = np.cumsum(rng.random(len(met)) < 0.02)
    weight = 1.0 / np.arange(1, 41)
    tenant = rng.choice(40, sessions[-1] + 1, p=weight / weight.sum())[sessions]
    arm = (rng.random(40) < 0.5)[tenant]
    n = np.array([(~arm).sum(), arm.sum()])
    if not n.all():
        return False
    share = np.array([met[~arm].mean(), met[arm].mean()])
    z = (share[1] - share[0]) / math.sqrt(max(met.mean() * (1 - met.mean()) * (1 / n).sum(), 1e-12))
    return bool(2 * norm.sf(abs(z)) < 0.05)


def refitted_crosses(trial: Trial) -> bool:
    """Whether a boundary is ever crossed when each look fits the slope on all of its pairs."""
    x = trial.w * trial.c * (trial.blocks.replayed[trial.first] - trial.blocks.replayed[trial.second])
    slope = np.cumsum(trial.raw * x) / np.maximum(np.cumsum(x * x), 1e-12)
    evidence = SignFlips(trial.plan.sigma)
    looks = np.arange(FEWEST_PAIRS_TO_STOP - 1, len(x))
    d = (trial.raw - slope[:, None] * x)[looks]
    at = (np.arange(len(looks)), looks)
    return bool(np.maximum(evidence.log_e_better(d)[at], evidence.log_e_harm(d)[at]).max() >= math.log(50))


def unclosed_estimates(size: Size) -> tuple[float, float]:
    """Points by which a policy that passes over the late is better, on closed blocks, and on what had ended by then."""
    workload = stretch(SHOWN, 0.95, size.equal_blocks * LENGTHS.block_s, SEED)
    block, counted = block_of(workload.arrival_s)
    closed, unclosed = [], []
    for share in (0.0, 1.0):
        met, first_token_s = ran(SHOWN, 0.95, size.equal_blocks, SEED, (share,))
        ended = counted & (first_token_s <= (block + 1) * LENGTHS.block_s)
        closed.append(100 * float(met[counted].mean()))
        unclosed.append(100 * float(met[ended].mean()))
    return closed[1] - closed[0], unclosed[1] - unclosed[0]


# --- figures ---------------------------------------------------------------------------------------------------------


def percent(hits: Iterable[bool]) -> float:
    """Share of true ones in percent."""
    return round(100 * float(np.mean(list(hits))), 2)


def quantile(values: Sequence[float | None], q: float) -> float | None:
    """Over all runs, those that never got there last; None if that is the one asked for."""
    found = float(np.quantile([math.inf if v is None else v for v in values], q, method="higher"))
    return found if math.isfinite(found) else None


def median(values: Sequence[float | None]) -> float | None:
    """The middle one of all runs."""
    return quantile(values, 0.5)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
