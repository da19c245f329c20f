"""How often the gate promotes and the drift test alarms when nothing has changed, and what they find when it has.

    KAIROS_DATA=... python benchmarks/gate_and_drift.py

writes benchmarks/results/gate_and_drift.json and prints it with its pass marks. On made-up errors whose truth is known,
and on the data pack: models of its captured runs, refitted and shifted, on the errors of the rest in time order.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from record import meta
from scipy.signal import lfilter

from kairos.adapters.telemetry_files import read_telemetry
from kairos.predictors.drift import BLOCK_ROWS, REFERENCE_BLOCKS, Drift
from kairos.predictors.features import rows_of
from kairos.predictors.step_model import Prediction, StepModel
from kairos.predictors.training import operating_points, regressor
from kairos.scheduler_core.service.models.gate import LaterSteps, look
from kairos.scheduler_core.service.models.watch import calibrated, later_steps
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import Steps

OUT = Path(__file__).parent / "results" / "gate_and_drift.json"
RUNS = 200
REFITS = 6
CHAINS = 6
"""Series drawn from the errors of each captured run."""
STRETCH = 2_000
"""Rows drawn together, so that a drawn series hangs together as the recorded one does."""
WATCHED_BLOCKS = 240
CHANGED = 50
"""Series that are changed to see how soon that is found."""


def main() -> None:
    """Measure all, write the file, print it."""
    runs = list(captured())
    results: dict[str, Any] = {
        "made": meta("python benchmarks/gate_and_drift.py", [0]),
        "gate_made_up": [made_up(rows, gain) for rows in (2_000, 8_000, 20_000) for gain in (0.0, 0.1, 0.2)],
        "gate_on_the_pack": on_the_pack(runs),
        "drift_made_up": drift_of(list(made_up_errors())),
        "drift_on_the_pack": drift_of(list(drawn(runs))),
    }
    results["marks"] = marks(results)
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    for mark in results["marks"]:
        print(f"{mark['what']:72} {mark['found']:8.4f}  {mark['mark']:10} {'met' if mark['met'] else 'MISSED'}")


# -- the gate --------------------------------------------------------------------------------------------------------


def made_up(rows: int, gain: float) -> dict[str, Any]:
    """Promotions of a challenger whose loss is lower by `gain` standard deviations of a row; 0: not at all.

    Both models are right on average; their errors are fast and slow autoregressions of their own.
    """
    rng = np.random.default_rng([rows, round(100 * gain)])
    words = []
    for _ in range(RUNS):
        noise = 0.03 * rng.standard_t(5, rows)
        champion, challenger = (0.01 * (ar(rng, rows, 0.9) + ar(rng, rows, 0.995)) for _ in range(2))
        steps = LaterSteps(np.exp(noise), rng.integers(1, 33, rows), 2 ** rng.uniform(7, 13, rows), np.arange(rows))
        first = pinned(noise, champion)
        # a challenger whose own error is smaller by as much as makes the wanted gain
        second = pinned(noise, challenger * (1 - gain))
        words.append(look(steps, first, second, first=False).word)
    return {"rows": rows, "own_error_smaller_by": gain} | shares(words)


def pinned(noise: FloatArray, error: FloatArray) -> Prediction:
    """Predictions that are off by `error`, with the quantiles that they really have."""
    low, high = np.quantile(noise - error, [0.1, 0.9])
    return Prediction(np.exp(error + low), np.exp(error), np.exp(error + high))


def ar(rng: Generator, n: int, rho: float) -> FloatArray:
    """A stationary autoregression (n,) of unit variance."""
    drive = np.sqrt(1 - rho**2) * rng.normal(size=n)
    drive[0] = rng.normal()
    series: FloatArray = lfilter([1.0], [1.0, -rho], drive)
    return series


def captured() -> Iterator[Steps]:
    """Decode steps of the pack's captured runs, in time order."""
    for steps in read_telemetry([Path(os.environ["KAIROS_DATA"]) / "telemetry"]).steps:
        if steps.kind == "decode" and len(steps) >= 4_000:
            yield steps


def on_the_pack(runs: list[Steps]) -> list[dict[str, Any]]:
    """Each run's first half teaches, its second half judges."""
    words: dict[str, list[str]] = {}
    for number, steps in enumerate(runs):
        half = len(steps) // 2
        before, after = steps.take(np.arange(half)), steps.take(np.arange(half, len(steps)))
        champion = fitted(before)
        for seed in range(REFITS):
            refit = fitted(resampled(before, np.random.default_rng([number, seed])))
            words.setdefault("refit on the same data", []).append(verdict(after, champion, refit))
        for factor in (1.1, 1 / 1.1, 1.5):
            shifted = fitted(before, factor)
            name = f"trained on a copy x {factor:.2f}"
            words.setdefault(name, []).append(verdict(after, champion, shifted))
            words.setdefault(f"right, champion {name}", []).append(verdict(after, shifted, champion))
    return [{"challenger": name} | shares(found) for name, found in words.items()]


def fitted(steps: Steps, factor: float = 1.0) -> StepModel:
    """The model of these steps, had they taken `factor` times as long."""
    return regressor("decode").fit(rows_of(steps), factor * steps.step_s, operating_points(steps)).model_


def resampled(steps: Steps, rng: Generator) -> Steps:
    """The same steps drawn again, with replacement."""
    return steps.take(np.sort(rng.integers(0, len(steps), len(steps))))


def verdict(later: Steps, champion: StepModel, challenger: StepModel) -> str:
    """What the gate says when all later steps are enough."""
    first, second = (calibrated(model, later) for model in (champion, challenger))
    return look(later_steps(later), first, second, first=False).word


def shares(words: list[str]) -> dict[str, Any]:
    """How often each word was said."""
    return {"n": len(words)} | {word: words.count(word) / len(words) for word in ("promote", "keep", "wait")}


# -- drift -----------------------------------------------------------------------------------------------------------


def made_up_errors() -> Iterator[FloatArray]:
    """Errors with fast and slow parts, of one model each."""
    rows = (REFERENCE_BLOCKS + WATCHED_BLOCKS) * BLOCK_ROWS
    for seed in range(200):
        rng = np.random.default_rng(seed)
        yield 0.03 * rng.standard_t(5, rows) + 0.01 * ar(rng, rows, 0.9) + 0.01 * ar(rng, rows, 0.995)


def drawn(runs: list[Steps]) -> Iterator[FloatArray]:
    """Errors of each captured run under a model of its first half, drawn in stretches of the second."""
    rows = (REFERENCE_BLOCKS + WATCHED_BLOCKS) * BLOCK_ROWS
    for number, steps in enumerate(runs):
        half = len(steps) // 2
        model = fitted(steps.take(np.arange(half)))
        later = steps.take(np.arange(half, len(steps)))
        error = np.log(later.step_s / model.predict(rows_of(later)).median_s)
        for seed in range(CHAINS):
            rng = np.random.default_rng([number, seed])
            starts = rng.integers(0, len(error), rows // STRETCH + 1)
            yield error[(starts[:, None] + np.arange(STRETCH)).ravel()[:rows] % len(error)]


def drift_of(series: list[FloatArray]) -> list[dict[str, Any]]:
    """False alarms over the watched blocks, and how long a change remains unseen."""
    reference = REFERENCE_BLOCKS * BLOCK_ROWS
    false = [Drift().observe(errors, np.arange(len(errors)), 1) is not None for errors in series]
    rows: list[dict[str, Any]] = [{"change": "none", "series": len(series), "alarms": float(np.mean(false))}]
    changes = {
        "10 % slower": lambda e: e + np.log(1.1),
        "10 % faster": lambda e: e - np.log(1.1),
        "errors twice as wide": lambda e: 2 * e,
    }
    for name, change in changes.items():
        blocks = []
        for errors in series[:: max(1, len(series) // CHANGED)]:
            drift = Drift()
            drift.observe(errors[:reference], np.arange(reference), 1)
            changed = change(errors[reference:]).reshape(-1, BLOCK_ROWS)
            blocks.append(
                next(
                    (n + 1 for n, block in enumerate(changed) if drift.observe(block, np.arange(BLOCK_ROWS), 1)),
                    WATCHED_BLOCKS,
                )
            )
        found = {"median_blocks": float(np.median(blocks)), "p90_blocks": float(np.quantile(blocks, 0.9))}
        rows.append({"change": name, "series": len(blocks), **found})
    return rows


# -- what should be --------------------------------------------------------------------------------------------------


def marks(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The pass marks beside what was found."""
    pack = {row["challenger"]: row for row in results["gate_on_the_pack"]}
    at_8000 = next(r for r in results["gate_made_up"] if (r["rows"], r["own_error_smaller_by"]) == (8_000, 0.0))
    shifted = max(row["promote"] for name, row in pack.items() if name.startswith("trained on a copy"))
    checks = [("gate, made up, 8,000 rows: false promotions", at_8000["promote"], 0.05)]
    checks.append(("gate, pack, refit with the same data: promotions", pack["refit on the same data"]["promote"], 0.05))
    checks.append(("gate, pack, trained on a shifted copy: most promotions", shifted, 0.0))
    for where in ("made_up", "on_the_pack"):
        none, slower, faster, _ = results[f"drift_{where}"]
        checks.append((f"drift, {where}: false alarms in {WATCHED_BLOCKS} blocks", none["alarms"], 0.05))
        checks.append((f"drift, {where}: blocks until 10 % slower is found, median", slower["median_blocks"], 10))
        checks.append((f"drift, {where}: blocks until 10 % faster is found, median", faster["median_blocks"], 10))
    return [
        {"what": what, "found": found, "mark": f"<= {mark:g}", "met": found <= mark} for what, found, mark in checks
    ]


if __name__ == "__main__":
    sys.exit(main())
