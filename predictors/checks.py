"""The contract of a step-time predictor, as small checks with a sentence each; ours pass it, and so should yours."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from kairos.predictors.features import step_rows
from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.domain import Part, StepTimes
from kairos.scheduler_core.slo import FloatArray

_TOKENS = (1, 16, 100, 128, 129, 500, 512, 513, 1000, 4096, 5000, 30_000, 200_000, 2_000_000)
_BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 100, 512, 513, 700, 5000)
_CONTEXTS = (0, 1, 100, 1000, 5000, 20_000, 100_000, 1_000_000, 50_000_000)


def check_predictor(predictor: StepTimePredictor) -> None:
    """Runs every check; AssertionError names the one that failed."""
    for check in (every_number_is_usable, quantiles_are_ordered, single_is_batch, the_grid_is_the_prediction):
        check(predictor)
    check_step_times(predictor)


def check_step_times(times: StepTimes) -> None:
    """What any `StepTimes` must keep, linear or learned."""
    for check in _STEP_TIMES_CHECKS:
        check(times)


def every_number_is_usable(predictor: StepTimePredictor) -> None:
    """Grids are whole, their nodes ascend, and no number is missing, infinite, or a time below 0."""
    for model in predictor.models.values():
        u, v, seconds = (
            np.array(part, np.float64) for part in (model.surface.u, model.surface.v, model.surface.seconds)
        )
        assert seconds.shape == (len(u), len(v)), "a grid with holes"
        assert (np.diff(u) > 0).all(), "nodes that do not ascend"
        assert (np.diff(v) > 0).all(), "nodes that do not ascend"
        rest = [*model.prior.coefficients, *model.line, model.surface.slope_u, model.surface.slope_v]
        assert np.isfinite([*rest, model.interval.lower, model.interval.upper]).all(), "a number that is none"
        assert (np.isfinite(seconds) & (seconds > 0)).all(), "a step time that is none"
        assert 0 < model.interval.lower <= 1 <= model.interval.upper, "an interval beside its median"


def quantiles_are_ordered(predictor: StepTimePredictor) -> None:
    """0 < lower_s <= median_s <= upper_s, all finite, for steps of every kind."""
    lower_s, median_s, upper_s = predictor.predict(_rows())
    assert np.isfinite(upper_s).all()
    assert ((lower_s > 0) & (lower_s <= median_s) & (median_s <= upper_s)).all()


def single_is_batch(predictor: StepTimePredictor) -> None:
    """A step gets the same answer alone as among others."""
    x = _rows()
    alone = [predictor.predict(x[k : k + 1]).median_s[0] for k in range(len(x))]
    assert np.allclose(alone, predictor.predict(x).median_s, rtol=1e-12, atol=0)


def the_grid_is_the_prediction(predictor: StepTimePredictor) -> None:
    """What scheduling asks one by one is the median of the bulk prediction."""
    for batch in _BATCHES:
        bulk_s = predictor.predict_step(batch_size=batch, sum_context_tokens=1000 * batch).median_s[0]
        assert np.isclose(predictor.decode_step_s(batch, 1000 * batch), bulk_s, rtol=1e-9)
    for new in _TOKENS:
        bulk_s = predictor.predict_step(n_requests=1, new_tokens=new, cached_tokens=300).median_s[0]
        assert np.isclose(predictor.prefill_step_s([Part(new, 300)]), bulk_s, rtol=1e-9)


def prefill_never_falls(times: StepTimes) -> None:
    """More new tokens or more context never make a prefill step shorter."""
    for fixed in _CONTEXTS:
        _never_falls([times.prefill_step_s([Part(new, fixed)]) for new in _TOKENS])
    for fixed in _TOKENS:
        _never_falls([times.prefill_step_s([Part(fixed, context)]) for context in _CONTEXTS])


def decode_never_falls(times: StepTimes) -> None:
    """A larger batch or more context never make a decode step shorter."""
    for fixed in _CONTEXTS:
        _never_falls([times.decode_step_s(batch, fixed) for batch in _BATCHES])
    for fixed in _BATCHES:
        _never_falls([times.decode_step_s(fixed, context) for context in _CONTEXTS])


def remaining_is_the_sum_of_its_chunks(times: StepTimes) -> None:
    """A prompt in chunks takes what its steps take, one after the other; nothing left takes nothing."""
    steps_s = [times.prefill_step_s([Part(new, context)]) for new, context in ((2048, 100), (2048, 2148), (904, 4196))]
    assert np.isclose(times.remaining_prefill_s(5000, 100, 2048), sum(steps_s), rtol=1e-9)
    assert times.remaining_prefill_s(0, 100, 2048) == 0


def equal_noise_scales_a_step(times: StepTimes) -> None:
    """The same factor on every part is that factor on the step."""
    parts = [Part(700, 0), Part(300, 5000)]
    assert np.isclose(times.prefill_step_s(parts, [1.3, 1.3]), 1.3 * times.prefill_step_s(parts), rtol=1e-9)


_STEP_TIMES_CHECKS: tuple[Callable[[StepTimes], None], ...] = (
    prefill_never_falls,
    decode_never_falls,
    remaining_is_the_sum_of_its_chunks,
    equal_noise_scales_a_step,
)


def _never_falls(seconds: list[float]) -> None:
    assert seconds[0] > 0
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(seconds)), seconds


def _rows() -> FloatArray:
    new, context = (a.ravel() for a in np.meshgrid(_TOKENS, _CONTEXTS))
    batch, contexts = (a.ravel() for a in np.meshgrid(_BATCHES, _CONTEXTS))
    return np.concatenate(
        [
            step_rows(n_requests=1, new_tokens=new, attention_work=new * (context + new / 2)),
            step_rows(batch_size=batch, sum_context_tokens=contexts),
            step_rows(n_requests=1, new_tokens=512, attention_work=2e5, batch_size=batch, sum_context_tokens=contexts),
        ]
    )
