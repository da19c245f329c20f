"""What is kept of the model before the one that serves: when an alarm on the new one brings it back."""

import numpy as np

from kairos.predictors.drift import BLOCK_ROWS, REFERENCE_BLOCKS, Alarm
from kairos.scheduler_core.service.models.watch import Former, Pending
from kairos.scheduler_core.slo import FloatArray

REFERENCE = REFERENCE_BLOCKS * BLOCK_ROWS
SLOWER = np.log(1.1)


ALARM = Alarm("slower", 0.0, 2, SLOWER)
NOISE = 0.02 * np.random.default_rng(0).normal(size=REFERENCE + 3 * BLOCK_ROWS)
CHANGE = SLOWER * (np.arange(len(NOISE)) >= REFERENCE)


def former_after(errors: FloatArray, serving: FloatArray) -> Former:
    """A former model with these errors, beside those of the model that serves."""
    former = Former(Pending(1, 0))
    for start in range(0, len(errors), 700):
        part = slice(start, start + 700)
        former.observe(errors[part], serving[part], np.arange(len(errors[part]), dtype=float), 1)
    return former


def test_a_model_with_as_good_predictions_as_ever_knows_the_change() -> None:
    assert former_after(NOISE, NOISE + CHANGE).knows(ALARM)


def test_a_change_that_wide_errors_hide_is_one_nevertheless() -> None:
    wide = 0.5 * np.sin(np.arange(len(NOISE)) / 1_500) + NOISE
    former = former_after(wide + CHANGE, NOISE + CHANGE)

    assert (former.drifted, former.knows(ALARM)) == (False, False)


def test_a_model_that_was_too_slow_by_chance_as_much_as_steps_now_are_does_not_know_them() -> None:
    former = former_after(NOISE - SLOWER + CHANGE, NOISE + CHANGE)

    assert former.recent[1] < former.recent[2]
    assert not former.knows(ALARM)


def test_a_model_that_is_worse_even_so_does_not_come_back() -> None:
    former = former_after(NOISE + 0.3, NOISE + CHANGE)

    assert (former.drifted, former.knows(ALARM)) == (False, False)
