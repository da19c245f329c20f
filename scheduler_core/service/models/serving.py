"""What answers for each profile: the model that was promoted, else the configuration, else the closest known one."""

from collections.abc import Mapping
from copy import copy
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from kairos.predictors.artifact import Predictors, ProfileModels, load
from kairos.predictors.online import Correction, Corrections, factor_of, scaled_line
from kairos.predictors.step_model import StepModel, mixed_of, model_of_line
from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.domain import LinearStepTimes, Profile, StepTimes
from kairos.scheduler_core.telemetry import STEP_KINDS, StepKind


class Served(NamedTuple):
    """A promoted model."""

    version: int
    trained_at: datetime
    learned: ProfileModels
    origins: Mapping[StepKind, int]
    """The version that each kind's model was trained as."""

    @property
    def model_id(self) -> str:
        """As answers name it."""
        return f"{self.learned.profile.profile_id}@{self.version}"


class Corrected(msgspec.Struct, frozen=True):
    """A correction, and of which model: it holds for no other."""

    origin: int
    correction: Correction


class Configured(NamedTuple):
    """The models that a configuration gives."""

    by_id: Mapping[str, Mapping[StepKind, StepModel]]
    """Of its profiles."""
    written: list[ProfileModels]
    """All that its model files hold."""


class Serving:
    """The models of one instant. Never changed: a newer one takes its place."""

    def __init__(self, configured: Configured, served: Mapping[str, Served], troubles: tuple[str, ...] = ()) -> None:
        self.served = served
        """By profile id."""
        self.troubles = troubles
        """Models that cannot be read, in sentences; the ones before them serve."""
        self._configured = configured.by_id
        known = {entry.profile.profile_id: entry for entry in configured.written}
        known |= {profile_id: entry.learned for profile_id, entry in served.items()}
        self._known = Predictors(list(known.values()))
        self._models: dict[str, dict[StepKind, StepModel]] = {}
        self._corrected: Mapping[tuple[str, StepKind], Corrected] = {}
        self.knows_models = bool(known)

    def with_corrections(self, corrected: Mapping[tuple[str, StepKind], Corrected]) -> "Serving":
        """The same models with newer corrections."""
        newer = copy(self)
        newer._corrected = corrected
        return newer

    def models(self, profile: Profile) -> Mapping[StepKind, StepModel]:
        """What serves each kind, uncorrected."""
        profile_id = profile.profile_id
        if profile_id not in self._models:
            own = self.served[profile_id].learned.models if profile_id in self.served else {}
            configured = self._configured.get(profile_id, {})
            other = self._known.profile(profile).models
            self._models[profile_id] = {k: own.get(k) or configured.get(k) or other[k] for k in STEP_KINDS}
        return self._models[profile_id]

    def origin(self, profile_id: str, kind: StepKind) -> int:
        """The version that a kind's model was trained as; 0: it was not promoted."""
        return self.served[profile_id].origins.get(kind, 0) if profile_id in self.served else 0

    def corrections(self, profile_id: str) -> Corrections:
        """Those that belong to the models that serve a profile."""
        return {
            kind: found.correction
            for kind in STEP_KINDS
            if (found := self._corrected.get((profile_id, kind))) and found.origin == self.origin(profile_id, kind)
        }

    def predictor(self, profile: Profile) -> StepTimePredictor:
        """What serves a profile, corrected."""
        return StepTimePredictor(profile, self.models(profile), self.corrections(profile.profile_id))

    def profile(self, profile_id: str) -> Profile:
        """The profile of an id.

        Raises:
            UnknownProfileError: it is no id and nothing was trained under it.
        """
        return self._known.profile(profile_id).profile

    def corrected(self, times: StepTimes, profile_id: str) -> StepTimes:
        """Step times of the configuration with what telemetry says of their level."""
        corrections = self.corrections(profile_id)
        if isinstance(times, StepTimePredictor):
            return StepTimePredictor(times.profile, times.models, corrections)
        if isinstance(times, LinearStepTimes):
            return LinearStepTimes(
                scaled_line(times.prefill, factor_of(corrections, "prefill")),
                scaled_line(times.decode, factor_of(corrections, "decode")),
            )
        return times


def configured_models(settings: Settings) -> Configured:
    """The models of a configuration.

    Raises:
        InputError, SchemaError: a file cannot be read, or is of another schema.
    """
    by_id: dict[str, dict[StepKind, StepModel]] = {}
    written: list[ProfileModels] = []
    for entry in settings.profiles.values():
        times, profile_id = entry.step_times, entry.as_profile().profile_id
        if times is not None and times.linear is not None:
            lines = times.linear.as_step_times()
            prefill = model_of_line("prefill", lines.prefill, "coefficients of the configuration")
            decode = model_of_line("decode", lines.decode, "coefficients of the configuration")
            by_id[profile_id] = {"prefill": prefill, "decode": decode, "mixed": mixed_of(prefill, decode)}
        elif times is not None and times.model is not None:
            predictors = load(Path(times.model))
            written += predictors.learned.values()
            if profile_id in predictors.learned:
                by_id[profile_id] = predictors.learned[profile_id].models
    return Configured(by_id, written)
