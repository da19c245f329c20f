"""The step times of a profile of the configuration: as written there, from a trained model, or a prior."""

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.domain import Line, LinearStepTimes, StepTimes
from kairos.scheduler_core.errors import ConfigError


def step_times_of(settings: Settings, profile: str) -> StepTimes:
    """How long the steps of a profile take."""
    times = settings.profiles[profile].step_times
    if times is not None and times.linear is not None:
        prefill, decode = times.linear.prefill, times.linear.decode
        return LinearStepTimes(
            Line(prefill.a_s, prefill.b_s, prefill.c_s), Line(decode.a_s, decode.b_s, decode.c_s)
        )
    raise ConfigError(f"profiles.{profile}.step_times needs linear")
