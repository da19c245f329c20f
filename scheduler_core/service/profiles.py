"""Which step times an instance of a snapshot has: those of its profile, or of the closest that is known."""

from pathlib import PurePath
from typing import NamedTuple

from kairos.predictors.profiles import step_times_of
from kairos.predictors.roofline import closest
from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.config import ProfileSettings, Settings
from kairos.scheduler_core.domain import Profile, StepTimes


class KnownProfile(NamedTuple):
    """A profile of the configuration with its step times loaded."""

    name: str
    step_times: StepTimes
    version: str
    """Where they come from: `linear`, the model's file, or what prior."""
    model: str
    note: str
    """What does not rest on measurements of this profile; empty if all does, or if it was configured so."""


class Profiles:
    """The profiles of a configuration by name and by id, loaded once.

    Raises:
        InputError: a model cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.by_name = {
            name: _known(name, profile, step_times_of(settings, name)) for name, profile in settings.profiles.items()
        }
        self._by_id = {profile.as_profile().profile_id: name for name, profile in settings.profiles.items()}

    def knows(self, name: str) -> bool:
        """Whether a profile is configured under this name or id."""
        return name in self.by_name or name in self._by_id

    def find(self, name: str) -> KnownProfile:
        """The profile of that name or id; the closest to it where there is none."""
        if name in self.by_name:
            return self.by_name[name]
        if name in self._by_id:
            return self.by_name[self._by_id[name]]
        near = closest(_parse(name), [_parse(profile_id) for profile_id in self._by_id])
        return self.by_name[self._by_id[near.profile_id]]


def _known(name: str, profile: ProfileSettings, times: StepTimes) -> KnownProfile:
    source = times.source if isinstance(times, StepTimePredictor) else "bandwidth, FLOPs and model size"
    configured = profile.step_times
    if configured is None:
        note = f"profile '{name}' has no step times: {source}"
        return KnownProfile(name, times, "prior", profile.model, note)
    if configured.model is None:
        return KnownProfile(name, times, "linear", profile.model, "")
    borrowed = isinstance(times, StepTimePredictor) and times.is_borrowed
    note = f"profile '{name}' is not (wholly) in its model: {source}" if borrowed else ""
    return KnownProfile(name, times, PurePath(configured.model).name, profile.model, note)


def _parse(profile_id: str) -> Profile:
    """A profile whose id this is; what is no id may still tell GPU and model by the words in it."""
    parts = profile_id.lower().split("_")
    if len(parts) != 6:
        return Profile(gpu=profile_id, model=profile_id)
    gpu, model, precision, tp, ep, engine = parts
    return Profile(gpu, model, precision, _degree(tp), _degree(ep), engine)


def _degree(text: str) -> int:
    return int(text) if text.isdecimal() and 0 < int(text[:6]) <= 4096 else 1
