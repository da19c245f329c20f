"""What following the steps between trainings is worth: errors and coverage before and after, on the data pack.

    KAIROS_DATA=... python benchmarks/online.py

writes benchmarks/results/online.json and prints it with the goals beside. Every step is predicted by a model that
did not see its operating point (5 folds, as in benchmarks/predictor.py); the steps of a profile come in the order in
which they were recorded. `late` is a correction that knows a step only 50 steps after it ended, as telemetry comes.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import meta

from kairos.adapters.telemetry_files import read_telemetry
from kairos.predictors.conformal import Interval
from kairos.predictors.evaluate import FOLDS
from kairos.predictors.features import rows_of
from kairos.predictors.online import Online, Quantiles
from kairos.predictors.step_model import folds_of, kind_mask, load_of
from kairos.predictors.training import StepsByKind, by_profile, regressor, training_rows
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepKind

OUT = Path(__file__).parent / "results" / "online.json"
NOISE_FLOOR = 0.0087
"""As in benchmarks/predictor.py."""
LATE_STEPS = 50
LEARNT_BY = 1_000
"""Coverage is counted from this step on."""


def main() -> None:
    """Measure, write the file, print it."""
    steps = read_telemetry([Path(os.environ["KAIROS_DATA"]) / "telemetry"]).steps
    rows = list(measured(by_profile(steps).values()))
    decode = [row for row in rows if row["kind"] == "decode"]
    covered = [row for row in decode if row["coverage"]]
    floor = {name: median(row[name] for row in decode) for name in ("static", "online", "late")}
    coverage_off = {
        when: {"median": median(off(row[when]) for row in covered), "worst": max(off(row[when]) for row in covered)}
        for when in ("coverage_before", "coverage")
    }
    results: dict[str, Any] = {
        "made": meta("python benchmarks/online.py", [0]),
        "rows": rows,
        "decode_median_ape": floor,
        "coverage_off": coverage_off,
        "goals": [
            goal("decode, unseen points, online: median error over noise floor", floor["online"] / NOISE_FLOOR, 1.25),
            goal("decode, coverage of P10 and P90: off by, median profile", coverage_off["coverage"]["median"], 0.03),
        ],
    }
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(floor), json.dumps(coverage_off))
    for line in results["goals"]:
        print(
            f"{line['what']:66} {line['found']:8.4f}  goal <= {line['goal']:<6g} {'met' if line['met'] else 'MISSED'}"
        )


def off(coverage: dict[str, float]) -> float:
    """How far the shares beyond P10 and P90 are from a tenth, on average."""
    return (abs(coverage["below"] - 0.1) + abs(coverage["above"] - 0.1)) / 2


def goal(what: str, found: float, limit: float) -> dict[str, Any]:
    """A goal beside what was found."""
    return {"what": what, "found": round(found, 4), "goal": limit, "met": found <= limit}


def measured(profiles: Iterable[StepsByKind]) -> Iterator[dict[str, Any]]:
    """One row a profile and kind with two operating points or more; what its source calls noisy is left out."""
    for kinds in profiles:
        for kind, steps in kinds.items():
            unseen = unseen_predictions(kinds, kind)
            if np.isnan(unseen).any() or steps.noisy.all():
                continue
            errors = np.log(steps.step_s / unseen)
            interval = Interval(*(float(np.median(unseen[side] / unseen[1])) for side in (0, 2)))
            lower, held, upper = Online(Quantiles.start(interval)).observe(errors[1], load_of(kind, rows_of(steps)))
            late = np.concatenate([np.zeros(min(LATE_STEPS, len(held))), held[:-LATE_STEPS]])
            yield {
                "profile": steps.profile.profile_id,
                "kind": kind,
                "n": len(steps),
                "static": error_of(errors[1]),
                "online": error_of(errors[1] - held),
                "late": error_of(errors[1] - late),
                "coverage_before": beyond(errors[0], errors[2]),
                "coverage": beyond(errors[1] - lower, errors[1] - upper),
            }


def unseen_predictions(kinds: StepsByKind, kind: StepKind) -> FloatArray:
    """Quantiles (3, n) of steps by models that did not see their operating points; NaN where there was but one."""
    x, y, points = training_rows(kinds, kind)
    own = kind_mask(kind, x)
    quantiles = np.full((3, len(kinds[kind])), np.nan)
    for out in folds_of(points, own, FOLDS):
        model = regressor(kind).fit(x[~out], y[~out], points[~out]).model_
        quantiles[:, out[: quantiles.shape[1]]] = model.predict(x[out])
    return quantiles


def error_of(log_error: FloatArray) -> float:
    """Median relative error, as a fraction."""
    return round(float(np.median(np.abs(np.expm1(-log_error)))), 6)


def beyond(over_lower: FloatArray, over_upper: FloatArray) -> dict[str, float] | None:
    """The shares below P10 and above P90 once the quantiles have learnt; None: too few steps."""
    if len(over_lower) < 2 * LEARNT_BY:
        return None
    below, above = (over_lower[LEARNT_BY:] < 0).mean(), (over_upper[LEARNT_BY:] > 0).mean()
    return {"below": round(float(below), 4), "above": round(float(above), 4)}


if __name__ == "__main__":
    sys.exit(main())
