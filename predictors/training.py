"""From telemetry to models: which rows teach which kind of step."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kairos.predictors.artifact import ProfileModels
from kairos.predictors.baselines import Baselines
from kairos.predictors.features import rows_of
from kairos.predictors.step_model import StepRegressor, kind_mask
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import IntArray, StepKind, Steps

HELPERS: dict[StepKind, tuple[StepKind, ...]] = {
    "prefill": ("mixed",),
    "decode": (),
    "mixed": ("prefill", "decode"),
}
"""Kinds whose rows also fit the prior: a mixed step tells what tokens cost, a decode step what reading KV costs."""

StepsByKind = dict[StepKind, Steps]


def by_profile(steps: Iterable[Steps]) -> dict[Profile, StepsByKind]:
    """Steps by profile, then kind."""
    found: dict[Profile, StepsByKind] = {}
    for group in steps:
        found.setdefault(group.profile, {})[group.kind] = group
    return found


def operating_points(steps: Steps) -> IntArray:
    """The operating point of each step, (n,): run, batch or request count, half octave of total tokens.

    Of decode steps also the phase before. What is held back is always a whole point, never rows of one.
    """
    tokens = steps.new_tokens + steps.cached_tokens + steps.sum_context_tokens
    key = [steps.run, np.floor(2 * np.log2(np.maximum(tokens, 1))), steps.batch_size, steps.n_requests]
    if steps.kind == "decode":
        key.append(steps.prev_phase)
    return np.unique(np.stack(key, axis=1), axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def training_rows(steps: StepsByKind, kind: StepKind) -> tuple[FloatArray, FloatArray, IntArray]:
    """Rows that teach a kind: features (n, len(FEATURES)), seconds (n,), operating points (n,); its own come first."""
    groups = [steps[k] for k in (kind, *HELPERS[kind]) if k in steps]
    points, first = [], 0
    for group in groups:
        points.append(operating_points(group) + first)
        first = int(points[-1].max()) + 1
    x = np.concatenate([rows_of(group) for group in groups])
    return x, np.concatenate([group.step_s for group in groups]), np.concatenate(points)


def regressor(kind: StepKind) -> StepRegressor:
    """The estimator of a kind.

    Mixed steps take no residual: it sees tokens and attention work, and what is left of a mixed step hangs on more.
    """
    return StepRegressor(kind, residuals=()) if kind == "mixed" else StepRegressor(kind)


def train(steps: Sequence[Steps]) -> Iterator[ProfileModels]:
    """One profile after the other, so that a caller can show progress."""
    for profile, kinds in by_profile(steps).items():
        models, baselines = {}, {}
        for kind in kinds:
            x, y, points = training_rows(kinds, kind)
            own = kind_mask(kind, x)
            models[kind] = regressor(kind).fit(x, y, points).model_
            baselines[kind] = Baselines.fit(kind, x[own], y[own])
        yield ProfileModels(profile, models, baselines)
