"""What is kept of each profile and kind while telemetry comes in: its errors, what waits to be judged by them."""

from statistics import fmean
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from kairos.predictors.drift import BLOCK_ROWS, Alarm, Drift
from kairos.predictors.features import rows_of
from kairos.predictors.online import Online, Quantiles
from kairos.predictors.step_model import Prediction, StepModel, load_of
from kairos.scheduler_core.service.models.gate import LaterSteps, enough
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import Steps

SHADOW_S = 24 * 3600.0
"""For how long a model that was replaced goes on being scored."""


class Pending(msgspec.Struct):
    """A model that later steps will judge, once there are enough of them."""

    version: int
    """0: the step times of the configuration, or the prior."""
    after_step: int
    """Id of the last step it learned from."""
    rows: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    wait_rows: int = 0
    """The next look is not before so many."""

    def count(self, ended_at_s: FloatArray, after: int) -> None:
        """Take note of n more steps (n,), all with ids above `after`; unless the model may have learned from some."""
        if after < self.after_step:
            return
        if not self.rows:
            self.first_s = float(ended_at_s.min())
        self.rows += len(ended_at_s)
        self.last_s = max(self.last_s, float(ended_at_s.max()))

    def due(self, *, first: bool) -> bool:
        """Whether to look now."""
        return self.rows >= self.wait_rows and enough(self.rows, self.last_s - self.first_s, first=first)


class Former(msgspec.Struct):
    """The model that served before, scored in its shadow: it comes back if the new one is worse."""

    pending: Pending
    drift: Drift = msgspec.field(default_factory=Drift)
    drifted: bool = False
    recent: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Means over about the last block of steps: its log error, its |log error|, and that of the model that serves."""
    looked: bool = False

    def observe(self, log_error: FloatArray, of_serving: FloatArray, ended_at_s: FloatArray, watched: int) -> None:
        """Take n more errors of it and of the model that serves, with the times of their steps, each (n,)."""
        n, kept = len(log_error), 1 - 1 / BLOCK_ROWS
        weights = (1 - kept) * kept ** np.arange(n)[::-1]
        new = weights @ np.column_stack([log_error, np.abs(log_error), np.abs(of_serving)])
        error, size, serving = (kept**n * np.array(self.recent) + new).tolist()
        self.recent = error, size, serving
        self.drifted |= self.drift.observe(log_error, ended_at_s, watched) is not None

    def knows(self, alarm: Alarm) -> bool:
        """Whether the change that the model that serves has met is hardly one for this model, which predicts better.

        Wide errors can hide a change from its own drift test, hence its shift is asked for, too.
        """
        if self.drifted or not self.drift.reference:
            return False
        place = 1 if alarm.series == "wider" else 0
        usual = fmean(block[place] for block in self.drift.reference)
        return self.recent[1] < self.recent[2] and abs(self.recent[place] - usual) < abs(alarm.shift) / 2


class Watch(msgspec.Struct):
    """One profile and kind."""

    origin: int
    """The version that the model of this kind came from; 0: the configuration's, or the prior."""
    online: Online
    drift: Drift = msgspec.field(default_factory=Drift)
    unlearned_rows: int = 0
    """Steps since the last training."""
    changed_at_s: float = 0.0
    """UTC epoch seconds since when steps take what they take now; older ones teach nothing."""
    challenger: Pending | None = None
    former: Former | None = None


class Happening(NamedTuple):
    """Something that an operator would want to know."""

    kind: Literal["drift", "coverage", "alone"]
    """alone: drift of the model that serves, and not of the one before it."""
    detail: dict[str, Any]


def new_watch(origin: int, model: StepModel) -> Watch:
    """Nothing seen yet of this model."""
    return Watch(origin, Online(Quantiles.start(model.interval)))


def observe(
    watch: Watch, steps: Steps, after: int, model: StepModel, former: StepModel | None, watched: int
) -> list[Happening]:
    """Take steps in, in order of their end; what they tell.

    Args:
        after: their ids are above it.
        model: what serves this kind, uncorrected. Drift is looked for in its errors: a correction would hide it.
        former: the model behind `watch.former`.
        watched: how many profiles and kinds are watched.
    """
    x = rows_of(steps)
    log_error = np.log(steps.step_s / model.predict(x).median_s)
    watch.online.observe(log_error, load_of(steps.kind, x))
    watch.unlearned_rows += len(steps)
    if watch.challenger:
        watch.challenger.count(steps.ended_at_s, after)
    if watch.former:
        watch.former.pending.count(steps.ended_at_s, after)
        if former:
            of_former = np.log(steps.step_s / former.predict(x).median_s)
            watch.former.observe(of_former, log_error, steps.ended_at_s, watched)
    told: list[Happening] = []
    if alarm := watch.drift.observe(log_error, steps.ended_at_s, watched):
        watch.online.quantiles.reset()
        watch.changed_at_s = alarm.since_s
        alone = watch.former is not None and watch.former.knows(alarm)
        told.append(Happening("alone" if alone else "drift", alarm._asdict()))
    if off := watch.online.quantiles.coverage_alarm():
        told.append(Happening("coverage", {"below_p10": off[0], "above_p90": off[1]}))
    if watch.former and watch.former.pending.last_s - watch.former.pending.first_s > SHADOW_S:
        watch.former = None
    return told


def in_order(steps: Steps) -> Steps:
    """The same steps in order of their end."""
    return steps.take(np.argsort(steps.ended_at_s, kind="stable"))


def later_steps(steps: Steps) -> LaterSteps:
    """Steps as the gate takes them."""
    x = rows_of(steps)
    requests = np.maximum(steps.batch_size if steps.kind == "decode" else steps.n_requests, 1)
    tokens = steps.sum_context_tokens if steps.kind == "decode" else steps.new_tokens + steps.cached_tokens
    return LaterSteps(steps.step_s, load_of(steps.kind, x), tokens / requests, steps.ended_at_s)


def calibrated(model: StepModel, steps: Steps) -> Prediction:
    """What a model says of steps: its own median, and the quantiles that it would have been served with.

    The correction of the level is left out: it would make every model look as good as the best.
    """
    x = rows_of(steps)
    median_s = model.predict(x).median_s
    lower, upper = Quantiles.start(model.interval).observe(np.log(steps.step_s / median_s), load_of(steps.kind, x))
    return Prediction(median_s * np.exp(lower), median_s, median_s * np.exp(upper))
