"""One kind of step of one profile: prior x residual, as a monotone surface with calibrated quantiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from kairos.predictors.conformal import Interval, split_conformal
from kairos.predictors.features import GRAPH_SIZES, column, step_rows
from kairos.predictors.prior import Prior, fit_nonnegative, fit_prior, terms
from kairos.predictors.residual import Residual, SmoothResidual, TreeResidual
from kairos.predictors.surface import Surface
from kairos.scheduler_core.domain import Line
from kairos.scheduler_core.errors import TelemetryError
from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.telemetry import IntArray, StepKind


class Prediction(NamedTuple):
    """Quantiles of n steps, each (n,), with 0 < lower_s <= median_s <= upper_s."""

    lower_s: FloatArray
    median_s: FloatArray
    upper_s: FloatArray


class HeldBack(msgspec.Struct, frozen=True):
    """Median relative errors on operating points held back in training, as fractions; None: there was but one."""

    median_ape: float | None = None
    prior_median_ape: float | None = None


class StepModel(msgspec.Struct, frozen=True):
    """A fitted kind of step: nothing but numbers, so that it needs no library to serve and no pickle to travel.

    Step seconds = surface(u, v) + extras, where u, v are batch and summed context of a decode step, tokens and
    attention work of another; extras are the terms that stand beside them (prompts, the phase before).
    """

    kind: StepKind
    prior: Prior
    surface: Surface
    interval: Interval
    line: Line
    """The linear form nearest to the surface: a + b u + c v."""
    source: str
    """Where it comes from, for people: measured steps, or a closest profile."""
    measured: bool = False
    held_back: HeldBack = HeldBack()

    def predict(self, x: FloatArray) -> Prediction:
        """Predicts n steps at once; one step is n = 1.

        Args:
            x: (n, len(FEATURES)) rows from `features.step_rows`.
        """
        median_s = self.surface.batch(*_uv(self.kind, x)) + _extras(self.prior, x)
        return Prediction(median_s * self.interval.lower, median_s, median_s * self.interval.upper)

    @property
    def further_s(self) -> float:
        """Seconds that every prompt after the first adds to a step by being there."""
        return 0.0 if self.kind == "decode" else self.prior.coefficients[_FURTHER]

    def scaled(self, factor: float, source: str) -> "StepModel":
        """The same shape, `factor` times as long, for another profile; its interval is as wide as that is unsure."""
        surface = self.surface
        return StepModel(
            kind=self.kind,
            prior=Prior(self.kind, [factor * c for c in self.prior.coefficients]),
            surface=Surface(
                surface.u,
                surface.v,
                [[factor * seconds for seconds in row] for row in surface.seconds],
                factor * surface.slope_u,
                factor * surface.slope_v,
            ),
            interval=Interval(self.interval.lower / _BORROWED, self.interval.upper * _BORROWED),
            line=Line(*(factor * c for c in self.line)),
            source=source,
        )


def model_of_line(kind: StepKind, line: Line, source: str) -> StepModel:
    """A linear step time in the form of a model, for profiles that nothing was measured of."""
    names = len(terms(kind, step_rows())[0][0])
    coefficients = np.zeros(names)
    coefficients[[0, 1, _CONTEXT if kind == "decode" else _WORK]] = line
    prior = Prior(kind, coefficients.tolist())
    return StepModel(kind, prior, _surface(prior, None), Interval(1 / _UNSURE, _UNSURE), line, source)


def mixed_of(prefill: StepModel, decode: StepModel) -> StepModel:
    """A mixed step from the two kinds it joins: a prefill step with more tokens that also reads the decodes' KV."""
    coefficients = list(prefill.prior.coefficients)
    coefficients[_KV] = decode.line.c_s
    return StepModel(
        kind="mixed",
        prior=Prior("mixed", coefficients),
        surface=prefill.surface,
        interval=Interval(prefill.interval.lower / _BORROWED, prefill.interval.upper * _BORROWED),
        line=prefill.line,
        source="from its prefill and decode steps",
    )


_BORROWED, _UNSURE = 1.3, 2.0
"""Factors on both sides of a median that was not measured: of another profile, of first principles."""
_WORK, _FURTHER, _KV = 2, 3, 4
_PREFILL_EXTRAS = (3, 4, 5)
_CONTEXT = 3
_DECODE_EXTRAS = (4, 5, 6)
"""Places in `prior.terms`: of prefill and mixed steps, of decode steps."""


class StepRegressor:
    """Learns a `StepModel`; a scikit-learn estimator without the dependency (fit, predict, get_params, set_params).

    Which prior (`ridges`: how far it may bend) and which residual serve, if any, is decided on `folds` of held-back
    groups. A more complicated one must be clearly better there than the simpler one, so noise switches nothing on.
    """

    def __init__(
        self,
        kind: StepKind = "decode",
        ridges: Sequence[float] = (np.inf, 0.01, 0.001),
        residuals: Sequence[str] = ("smooth", "trees"),
        folds: int = 5,
    ) -> None:
        self.kind = kind
        self.ridges = ridges
        self.residuals = residuals
        self.folds = folds

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {name: getattr(self, name) for name in ("kind", "ridges", "residuals", "folds")}

    def set_params(self, **params: Any) -> "StepRegressor":
        """Changes arguments of `__init__`."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"StepRegressor has no parameter '{name}'; it has {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def fit(
        self, x: FloatArray, y: FloatArray, groups: IntArray | None = None, sample_weight: ArrayLike | None = None
    ) -> "StepRegressor":
        """Learns from rows x (n, len(FEATURES)) that took y seconds (n,).

        Rows of other kinds help to fit the prior (a mixed step says what tokens cost in a prefill step) and count
        for nothing else.

        Args:
            groups: operating points (n,); what is held back together. None: every row by itself.
            sample_weight: (n,); None: all the same.

        Raises:
            TelemetryError: no row is of this kind.
        """
        own = kind_mask(self.kind, x)
        if not own.any():
            raise TelemetryError(f"no {self.kind} step to learn from; give telemetry with measured {self.kind} steps")
        groups = np.arange(len(x)) if groups is None else groups
        weight = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        weight = weight * _point_weight(groups) * np.where(own, 1.0, _HELPERS_SHARE * own.sum() / max(sum(~own), 1))
        held_back = [own & part for part in folds_of(groups, own, self.folds)]
        ridge, priors = self._choose_prior(x, y, weight, held_back)
        residual, log_error, held = self._choose_residual(x, y, weight, held_back, priors)
        prior = fit_prior(self.kind, x, y, weight, ridge)
        correction = _fit_residual(residual, prior, x[own], y[own], weight[own])
        surface = _surface(prior, correction)
        self.model_ = StepModel(
            kind=self.kind,
            prior=prior,
            surface=surface,
            interval=split_conformal(log_error),
            line=_nearest_line(self.kind, surface),
            measured=True,
            held_back=held,
            source=f"{int(own.sum())} measured {self.kind} steps, prior"
            + (f" x {residual}" if residual != "none" else ""),
        )
        return self

    def predict(self, x: FloatArray) -> FloatArray:
        """Median seconds (n,)."""
        return self.model_.predict(x).median_s

    def _choose_prior(
        self, x: FloatArray, y: FloatArray, weight: FloatArray, held_back: list[BoolArray]
    ) -> tuple[float, list[Prior]]:
        """How far the prior may bend, and the priors of the inner folds."""
        best, best_loss, best_priors = self.ridges[0], np.inf, list[Prior]()
        for ridge in self.ridges if held_back else ():
            priors = [fit_prior(self.kind, x[~out], y[~out], weight[~out], ridge) for out in held_back]
            errors = [np.log(y[out] / prior.predict(x[out])) for out, prior in zip(held_back, priors, strict=True)]
            loss = float(_losses(errors, [weight[out] for out in held_back])[:, 0].mean())
            if loss < (1 - _PRIOR_GAIN) * best_loss:
                best, best_loss, best_priors = ridge, loss, priors
        return best, best_priors

    def _choose_residual(
        self,
        x: FloatArray,
        y: FloatArray,
        weight: FloatArray,
        held_back: list[BoolArray],
        priors: list[Prior],
    ) -> tuple[str, FloatArray, HeldBack]:
        """The residual that serves, the log errors with it on steps it had not seen, and what they amount to.

        It must gain over all folds and lose on none, in mean and in median: what helps some operating points at the
        cost of others would make a profile worse than its own prior on the next ones.
        """
        own = kind_mask(self.kind, x)
        best, best_errors, prior_errors = "none", list[FloatArray](), list[FloatArray]()
        best_losses = np.full((len(held_back), 2), np.inf)
        for name in ("none", *self.residuals) if held_back else ():
            errors = []
            for out, prior in zip(held_back, priors, strict=True):
                kept = own & ~out
                correction = _fit_residual(name, prior, x[kept], y[kept], weight[kept])
                seconds = _surface(prior, correction).batch(*_uv(self.kind, x[out])) + _extras(prior, x[out])
                errors.append(np.log(y[out] / seconds))
            if name == "none":
                prior_errors = errors
            losses = _losses(errors, [weight[out] for out in held_back])
            gains = losses[:, 0].mean() < (1 - _RESIDUAL_GAIN) * best_losses[:, 0].mean()
            if gains and (losses <= best_losses).all():
                best, best_errors, best_losses = name, errors, losses
        if not held_back:
            return best, np.zeros(0), HeldBack()
        found = [float(np.median(np.abs(np.expm1(-np.concatenate(e))))) for e in (best_errors, prior_errors)]
        return best, np.concatenate(best_errors), HeldBack(*(round(ape, 6) for ape in found))


_PRIOR_GAIN, _RESIDUAL_GAIN = 0.05, 0.1
_TRUST = 0.5
"""The share of a learned correction that is applied: the rest of it is as often noise."""
_HELPERS_SHARE = 0.3
"""What all rows of other kinds weigh together, against those of the kind itself."""
_SURE = 0.5
"""Log errors beyond this count no more: a stall is nobody's fault."""
_RESIDUALS: dict[str, Any] = {"smooth": lambda: SmoothResidual(octaves=1.0), "trees": TreeResidual}


def kind_mask(kind: StepKind, x: FloatArray) -> BoolArray:
    """Which feature rows are steps of that kind, (n,)."""
    prompts, batch = column(x, "new_tokens") > 0, column(x, "batch_size") > 0
    mask: BoolArray = (
        prompts & ~batch if kind == "prefill" else batch & ~prompts if kind == "decode" else prompts & batch
    )
    return mask


def folds_of(groups: IntArray, among: BoolArray, folds: int) -> list[BoolArray]:
    """Masks (n,) that hold back whole groups, dealt out at random over `folds`; fewer where there are fewer groups."""
    names, place = np.unique(groups[among], return_inverse=True)
    if len(names) < 2:
        return []
    fold = np.full(len(groups), -1)
    fold[among] = (np.random.default_rng(0).permutation(len(names)) % folds)[place.ravel()]
    return [fold == k for k in range(min(folds, len(names)))]


def _point_weight(groups: IntArray) -> FloatArray:
    """A group of n rows weighs sqrt(n): more than one of few, less than all its rows."""
    _, place, count = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / np.sqrt(count[place.ravel()])


def _losses(errors: list[FloatArray], weights: list[FloatArray]) -> FloatArray:
    """Mean and median |log error| of each fold, (folds, 2)."""
    clipped = [np.minimum(np.abs(error), _SURE) for error in errors]
    means = [np.average(error, weights=weight) for error, weight in zip(clipped, weights, strict=True)]
    return np.stack([means, [np.median(error) for error in clipped]], axis=1)


def load_of(kind: StepKind, x: FloatArray) -> FloatArray:
    """What makes steps of a kind heavy, (n,): the batch size of decode steps, the tokens of others."""
    return _uv(kind, x)[0]


def _uv(kind: StepKind, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    if kind == "decode":
        return column(x, "batch_size"), column(x, "sum_context_tokens")
    return column(x, "new_tokens") + column(x, "batch_size"), column(x, "attention_work")


def _core_rows(kind: StepKind, u: FloatArray, v: FloatArray) -> FloatArray:
    """Rows that have nothing but u and v."""
    if kind == "decode":
        return step_rows(batch_size=u, sum_context_tokens=v)
    return step_rows(new_tokens=u, attention_work=v)


def _extras(prior: Prior, x: FloatArray) -> FloatArray:
    """Seconds (n,) of what is in a row beside u and v."""
    matrix = terms(prior.kind, x)[0]
    places = _DECODE_EXTRAS if prior.kind == "decode" else _PREFILL_EXTRAS
    seconds: FloatArray = matrix[:, places] @ np.array(prior.coefficients)[list(places)]
    return seconds


def _fit_residual(name: str, prior: Prior, x: FloatArray, y: FloatArray, weight: FloatArray) -> Residual | None:
    if name == "none" or len(x) == 0:
        return None
    u, v = _uv(prior.kind, x)
    core_s = prior.predict(_core_rows(prior.kind, u, v))
    log_ratio = np.log(np.maximum(y - _extras(prior, x), 0.1 * y) / core_s)
    residual: Residual = _RESIDUALS[name]().fit(u, v, log_ratio, weight)
    return residual


def _corrected(prior: Prior, residual: Residual | None, u: FloatArray, v: FloatArray) -> FloatArray:
    core_s = prior.predict(_core_rows(prior.kind, u, v))
    return core_s if residual is None else core_s * np.exp(_TRUST * residual.predict(u, v))


def _surface(prior: Prior, residual: Residual | None) -> Surface:
    # both sides of every CUDA-graph size, so that its jump stays a jump
    if prior.kind == "decode":
        u = np.unique(np.concatenate([np.arange(1, 65), GRAPH_SIZES, GRAPH_SIZES + 1, [600, 800, 1024, 2048]]))
        v = np.concatenate([[0], np.exp2(np.arange(4, 26, 0.5))])
    else:
        u = np.unique(np.concatenate([[1, 16, 32, 48, 64, 96, GRAPH_SIZES[-1] + 1], np.exp2(np.arange(7, 19, 0.25))]))
        v = np.concatenate([[0], np.exp2(np.arange(6, 38, 0.5))])
    return Surface.of(lambda a, b: _corrected(prior, residual, a, b), u.astype(np.float64), v)


def _nearest_line(kind: StepKind, surface: Surface) -> Line:
    """a + b u + c v with the least |log error| where serving happens."""
    if kind == "decode":
        u, per_u = np.exp2(np.arange(0, 6.5, 0.5)), np.exp2(np.arange(7, 15))
        u, v = (a.ravel() for a in np.meshgrid(np.round(u), per_u, indexing="ij"))
        v = u * v
    else:
        u, context = (a.ravel() for a in np.meshgrid(np.exp2(np.arange(5, 15.5, 0.5)), [0, 2048, 8192], indexing="ij"))
        v = u * (context + u / 2)
    matrix = np.stack([np.ones(len(u)), u, v], axis=1)
    return Line(*(float(c) for c in fit_nonnegative(matrix, 3, surface.batch(u, v), np.ones(len(u)))))
