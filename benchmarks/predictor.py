"""How good step-time predictions are and how fast, against what others predict with.

    KAIROS_DATA=... python benchmarks/predictor.py

writes benchmarks/results/predictor.json and prints it with the project's goals beside. Accuracy: held-back
operating points (5 folds), then the longest third of what each profile shows after training on the rest.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightgbm
import numpy as np

from kairos.adapters.telemetry_files import read_telemetry
from kairos.predictors.artifact import Predictors
from kairos.predictors.baselines import LookupTable
from kairos.predictors.evaluate import Row, cross_validate, scores, summary
from kairos.predictors.features import rows_of
from kairos.predictors.training import StepsByKind, by_profile, regressor, train, training_rows
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepKind, Steps

OUT = Path(__file__).parent / "results" / "predictor.json"
RUNS = 7
NOISE_FLOOR = 0.0087
"""Median error of the best possible decode predictor on the pack, as found by an independent study."""
EXAMPLE = "b300-sxm6_qwen-qwen3-32b_bf16_4_1_vllm-0-20-1"


def main() -> None:
    """Measure all, write the file, print it."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    made = {"commit": commit, "machine": machine, "command": "python benchmarks/predictor.py", "seeds": [0]}
    steps = read_telemetry([Path(os.environ["KAIROS_DATA"]) / "telemetry"]).steps
    rows = [row for group in cross_validate(steps) for row in group]
    totals = summary(rows)
    beyond = [found for kinds in by_profile(steps).values() for kind in kinds if (found := extrapolated(kinds, kind))]
    results = {
        "made": made,
        "unseen_operating_points": rows,
        "summary": totals,
        "extrapolated": beyond,
        "seconds": times(steps),
    }
    results["goals"] = goals(rows, totals, beyond, results["seconds"])
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    for goal in results["goals"]:
        met = "met" if goal["met"] else "MISSED"
        print(f"{goal['what']:66} {goal['found']:8.4f}  goal <= {goal['goal']:<6g} {met}")


def extrapolated(kinds: StepsByKind, kind: StepKind) -> Row | None:
    """Errors on the longest third of half octaves, decode by context a request and others by tokens.

    None for a profile that shows fewer than three of them.
    """
    steps = kinds[kind]
    level = np.floor(2 * np.log2(length(steps)))
    levels = np.unique(level)
    if len(levels) < 3:
        return None
    longest = levels[int(np.ceil(2 * len(levels) / 3)) - 1]
    seen = {k: s.take(np.floor(2 * np.log2(length(s))) <= longest) for k, s in kinds.items()}
    x, y, points = training_rows({k: s for k, s in seen.items() if len(s)}, kind)
    asked = steps.take(level > longest)
    model = regressor(kind).fit(x, y, points).model_
    own = len(seen[kind])
    predicted: dict[str, FloatArray] = {
        "kairos": model.predict(rows_of(asked)).median_s,
        "prior": model.prior.predict(rows_of(asked)),
        "lookup": LookupTable.fit(kind, x[:own], y[:own]).predict(rows_of(asked)),
    }
    errors = {name: scores(asked.step_s, seconds)["median_ape"] for name, seconds in predicted.items()}
    return {"profile": steps.profile.profile_id, "kind": kind, "n": len(asked), **errors}


def length(steps: Steps) -> FloatArray:
    """What is extrapolated in, (n,)."""
    if steps.kind == "decode":
        return np.maximum(steps.sum_context_tokens / steps.batch_size, 1)
    return np.maximum(steps.new_tokens, 1)


def times(steps: list[Steps]) -> dict[str, float]:
    """Seconds of one prediction, medians over the runs; everything in this process, one after the other."""
    kinds = [s for s in steps if s.profile.profile_id == EXAMPLE]
    predictor = Predictors(list(train(kinds))).profile(kinds[0].profile)
    decode = next(s for s in kinds if s.kind == "decode")
    x = rows_of(decode)
    settings: dict[str, Any] = {"num_threads": 1, "verbosity": -1, "num_leaves": 31}
    booster = lightgbm.train(settings, lightgbm.Dataset(x, decode.step_s), num_boost_round=100)
    one = x[:1]
    return {
        "booster_one": timed(lambda: booster.predict(one, num_threads=1), 500),
        "decode_one": timed(lambda: predictor.decode_step_s(17, 70_000), 20_000),
        "prefill_one": timed(lambda: predictor.remaining_prefill_s(5000, 100, None), 20_000),
        "bulk_per_row": timed(lambda: predictor.predict(x), 20) / len(x),
    }


def timed(work: Callable[[], object], calls: int) -> float:
    """Median over the runs of the mean seconds of a call."""
    found = []
    for _ in range(RUNS):
        start = perf_counter()
        for _ in range(calls):
            work()
        found.append((perf_counter() - start) / calls)
    return median(found)


def goals(rows: list[Row], totals: list[Row], beyond: list[Row], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The goals beside what was found."""
    of = {(total["kind"], total["noisy"]): total for total in totals}
    decode, prefill = of["decode", False], of["prefill", False]
    far = {kind: [row for row in beyond if row["kind"] == kind] for kind in ("decode", "prefill")}

    def far_median(kind: str, name: str) -> float:
        return median(row[name] for row in far[kind])

    worst = max(row["median_ape"] / row["baselines"]["prior"]["median_ape"] for row in rows)
    checks = [
        ("decode, unseen points: median error over noise floor", decode["kairos"] / NOISE_FLOOR, 2.2),
        ("decode, unseen points: over lookup table", decode["kairos"] / decode["lookup"], 0.6),
        ("decode, unseen points: over prior", decode["kairos"] / decode["prior"], 1.0),
        ("prefill, unseen points: median error", prefill["kairos"], 0.08),
        ("prefill, unseen points: over lookup table", prefill["kairos"] / prefill["lookup"], 0.3),
        ("worst profile and kind: over its own prior", worst, 1.05),
        ("decode, longer contexts: median error", far_median("decode", "kairos"), 0.06),
        (
            "decode, longer contexts: over lookup table",
            far_median("decode", "kairos") / far_median("decode", "lookup"),
            0.7,
        ),
        ("prefill, longer prompts: median error", far_median("prefill", "kairos"), 0.06),
        ("one decode prediction: over Booster.predict", seconds["decode_one"] / seconds["booster_one"], 0.25),
        ("one prefill prediction: over Booster.predict", seconds["prefill_one"] / seconds["booster_one"], 0.25),
        ("a row in bulk: over Booster.predict", seconds["bulk_per_row"] / seconds["booster_one"], 0.1),
    ]
    return [
        {"what": what, "found": round(float(found), 4), "goal": goal, "met": bool(found <= goal)}
        for what, found, goal in checks
    ]


if __name__ == "__main__":
    sys.exit(main())
