"""Which step times an instance of a snapshot has: those of its profile, or of the closest that is known."""

from copy import copy
from pathlib import PurePath
from typing import NamedTuple

from kairos.predictors.profiles import step_times_of
from kairos.predictors.roofline import closest
from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.config import ProfileSettings, Settings
from kairos.scheduler_core.domain import Profile, StepTimes
from kairos.scheduler_core.service.models.serving import Serving


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
    """The profiles of a configuration by name and by id, loaded once, and what was promoted for them since.

    Raises:
        InputError: a model cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self.by_name = {
            name: _known(name, profile, step_times_of(settings, name)) for name, profile in settings.profiles.items()
        }
        self._by_id = {profile.as_profile().profile_id: name for name, profile in settings.profiles.items()}
        self._settings = settings
        self._configured = self.by_name
        self._promoted: dict[str, KnownProfile] = {}

    def with_serving(self, serving: Serving) -> "Profiles":
        """The same profiles, answered by the models that serve now."""
        newer = copy(self)
        newer.by_name = {
            name: _serving(known, self._settings.profiles[name], serving) for name, known in self._configured.items()
        }
        newer._promoted = {
            profile_id: KnownProfile(
                profile_id, serving.predictor(entry.learned.profile), entry.model_id, entry.learned.profile.model, ""
            )
            for profile_id, entry in serving.served.items()
            if profile_id not in self._by_id
        }
        return newer

    def knows(self, name: str) -> bool:
        """Whether a profile is configured under this name or id, or a model of it was promoted."""
        return name in self.by_name or name in self._by_id or name in self._promoted

    def find(self, name: str) -> KnownProfile:
        """The profile of that name or id; the closest to it where there is none."""
        if name in self.by_name:
            return self.by_name[name]
        if name in self._by_id:
            return self.by_name[self._by_id[name]]
        if name in self._promoted:
            return self._promoted[name]
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


def _serving(known: KnownProfile, configured: ProfileSettings, serving: Serving) -> KnownProfile:
    """A profile of the configuration with the model that was promoted for it, or corrected by its telemetry."""
    profile = configured.as_profile()
    served = serving.served.get(profile.profile_id)
    if served is None and (configured.step_times is not None or not serving.knows_models):
        return known._replace(step_times=serving.corrected(known.step_times, profile.profile_id))
    predictor = serving.predictor(profile)
    note = f"profile '{known.name}' is not (wholly) measured: {predictor.source}" if predictor.is_borrowed else ""
    return KnownProfile(known.name, predictor, served.model_id if served else "prior", known.model, note)


def _parse(profile_id: str) -> Profile:
    """A profile whose id this is; what is no id may still tell GPU and model by the words in it."""
    parts = profile_id.lower().split("_")
    if len(parts) != 6:
        return Profile(gpu=profile_id, model=profile_id)
    gpu, model, precision, tp, ep, engine = parts
    return Profile(gpu, model, precision, _degree(tp), _degree(ep), engine)


def _degree(text: str) -> int:
    return int(text) if text.isdecimal() and 0 < int(text[:6]) <= 4096 else 1
