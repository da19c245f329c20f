"""How good predictions are, on operating points that the model has not seen, beside what others would predict."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kairos.predictors.artifact import Predictors
from kairos.predictors.baselines import Baselines, Forest
from kairos.predictors.conformal import LOWER, UPPER
from kairos.predictors.features import rows_of
from kairos.predictors.step_model import Prediction, folds_of, kind_mask
from kairos.predictors.training import by_profile, regressor, training_rows
from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.telemetry import Steps

FOLDS = 5

Row = dict[str, Any]
"""One row of `kairos evaluate --json` (docs/files.md)."""


def scores(actual_s: FloatArray, predicted_s: FloatArray) -> dict[str, float]:
    """Relative errors over n steps, as fractions.

    >>> scores(np.array([1.0, 2.0]), np.array([1.1, 2.2]))
    {'median_ape': 0.1, 'mape': 0.1, 'p95_ape': 0.1, 'bias': 0.1}
    """
    error = predicted_s / actual_s - 1
    ape = np.abs(error)
    figures = {
        "median_ape": np.median(ape),
        "mape": ape.mean(),
        "p95_ape": np.quantile(ape, 0.95),
        "bias": error.mean(),
    }
    return {name: round(float(value), 6) for name, value in figures.items()}


def pinball_losses(actual_s: FloatArray, predicted: Prediction) -> FloatArray:
    """Pinball loss of each of n steps (n,), the mean over the three quantiles of log time (docs/evidence.md)."""
    losses = []
    for level, quantile_s in zip((LOWER, 0.5, UPPER), predicted, strict=True):
        above = np.log(actual_s / quantile_s)
        losses.append(np.maximum(level * above, (level - 1) * above))
    mean: FloatArray = np.mean(losses, axis=0)
    return mean


def pinball(actual_s: FloatArray, predicted: Prediction) -> float:
    """Mean pinball loss over the steps."""
    return round(float(pinball_losses(actual_s, predicted).mean()), 6)


def _row(steps: Steps, noisy: bool, predicted: Prediction, baselines: Mapping[str, FloatArray], mask: BoolArray) -> Row:
    actual_s = steps.step_s[mask]
    predicted = Prediction(*(quantile[mask] for quantile in predicted))
    row: Row = {"profile": steps.profile.profile_id, "kind": steps.kind, "noisy": noisy, "n": len(actual_s)}
    row |= scores(actual_s, predicted.median_s)
    below = {"p10": (actual_s <= predicted.lower_s).mean(), "p90": (actual_s <= predicted.upper_s).mean()}
    row["coverage"] = {name: round(float(share), 4) for name, share in below.items()}
    row["pinball"] = pinball(actual_s, predicted)
    row["baselines"] = {}
    for name, seconds in baselines.items():
        figures = scores(actual_s, seconds[mask])
        row["baselines"][name] = {key: figures[key] for key in ("median_ape", "mape", "p95_ape")}
    return row


def _rows(steps: Steps, predicted: Prediction, baselines: Mapping[str, FloatArray], scored: BoolArray) -> Iterator[Row]:
    """Noisy steps are reported apart."""
    for noisy in (False, True):
        mask = scored & (steps.noisy == noisy)
        if mask.any():
            yield _row(steps, noisy, predicted, baselines, mask)


def cross_validate(steps: Sequence[Steps]) -> Iterator[list[Row]]:
    """Rows of each profile and kind in turn, every step predicted by a model that did not see its operating point.

    Nothing for a kind with a single operating point: there is nothing to hold back.
    """
    for kinds in by_profile(steps).values():
        for kind, group in kinds.items():
            x, y, points = training_rows(kinds, kind)
            own = kind_mask(kind, x)
            n = len(group)
            quantiles = np.full((3, n), np.nan)
            baselines = {name: np.full(n, np.nan) for name in ("prior", "linear", "lookup", "forest")}
            for out in folds_of(points, own, FOLDS):
                model = regressor(kind).fit(x[~out], y[~out], points[~out]).model_
                taught, asked = own & ~out, x[out]
                at = out[:n]
                quantiles[:, at] = model.predict(asked)
                baselines["prior"][at] = model.prior.predict(asked)
                for name, seconds in Baselines.fit(kind, x[taught], y[taught]).predict(asked).items():
                    baselines[name][at] = seconds
                baselines["forest"][at] = Forest().fit(x[taught], y[taught]).predict(asked)
            yield list(_rows(group, Prediction(*quantiles), baselines, np.isfinite(quantiles[0])))


def score_model(predictors: Predictors, steps: Sequence[Steps]) -> Iterator[list[Row]]:
    """Rows of each profile and kind in turn, all steps predicted by a trained model.

    Linear and lookup baselines are those fitted with the model, so a profile it does not know has the prior alone.
    """
    for group in steps:
        x = rows_of(group)
        predictor = predictors.profile(group.profile)
        model = predictor.models[group.kind]
        baselines = {"prior": model.prior.predict(x)}
        learned = predictors.learned.get(group.profile.profile_id)
        if learned is not None and group.kind in learned.baselines:
            baselines |= learned.baselines[group.kind].predict(x)
        rows = list(_rows(group, predictor.predict(x), baselines, np.ones(len(group), np.bool_)))
        yield [row | {"source": model.source} for row in rows]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per kind, the median over profiles of each median error; noisy rows apart."""
    result = []
    for kind, noisy in sorted({(row["kind"], row["noisy"]) for row in rows}):
        of_kind = [row for row in rows if (row["kind"], row["noisy"]) == (kind, noisy)]
        line: Row = {"kind": kind, "noisy": noisy, "profiles": len(of_kind)}
        line["kairos"] = round(float(np.median([row["median_ape"] for row in of_kind])), 6)
        for name in ("prior", "linear", "lookup", "forest"):
            errors = [row["baselines"][name]["median_ape"] for row in of_kind if name in row["baselines"]]
            if errors:
                line[name] = round(float(np.median(errors)), 6)
        result.append(line)
    return result
