"""The step times of a profile of the configuration: as written there, from a trained model, or a prior."""

import logging
from functools import lru_cache
from pathlib import Path

from kairos.predictors.artifact import Predictors, load
from kairos.predictors.roofline import roofline
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.domain import Profile, StepTimes

log = logging.getLogger(__name__)


def step_times_of(settings: Settings, profile: str) -> StepTimes:
    """How long the steps of a profile take.

    Coefficients if the configuration gives them, else its trained model. With neither: the closest profile in the
    models that other profiles of the configuration name, or the roofline where there is none.

    Raises:
        InputError: the model cannot be read.
        SchemaError: the model was made for another feature schema.
    """
    wanted = settings.profiles[profile].as_profile()
    times = settings.profiles[profile].step_times
    if times is not None and times.linear is not None:
        return times.linear.as_step_times()
    if times is not None and times.model is not None:
        return _predictor(times.model, wanted, profile)
    for other in settings.profiles.values():
        if other.step_times is not None and other.step_times.model is not None:
            return _predictor(other.step_times.model, wanted, profile)
    log.warning("profile %s has no step times: roofline from bandwidth, FLOPs and model size", profile)
    return roofline(wanted)


def _predictor(path: str, wanted: Profile, name: str) -> StepTimes:
    predictor = _loaded(path).profile(wanted)
    if predictor.is_borrowed:
        log.warning("profile %s is not (wholly) in the model %s: %s", name, path, predictor.source)
    return predictor


@lru_cache(maxsize=8)
def _loaded(path: str) -> Predictors:
    return load(Path(path))
