"""What a plugin is told: a small file, then `KAIROS_ENGINE_...` variables (docs/engines.md names every setting)."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from kairos.predictors.artifact import Predictors, load
from kairos.scheduler_core.domain import Line, LinearStepTimes, Profile, StepTimes
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.slo import NO_TARGET_S

PREFIX = "KAIROS_ENGINE_"
FILE = "KAIROS_ENGINE_CONFIG"
API_KEY = "KAIROS_API_KEY"

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Targets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is promised to a request; None: no such target."""

    ttft_s: Positive | None = 2.0
    tpot_s: Positive | None = 0.05

    def numbers(self) -> tuple[float, float]:
        """TTFT and TPOT target in seconds, inf where there is none."""
        return self.ttft_s or NO_TARGET_S, self.tpot_s or NO_TARGET_S


class Coefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Coefficients of one linear step time (docs/configuration.md)."""

    a_s: Annotated[float, Meta(ge=0)] = 0.0
    b_s: Annotated[float, Meta(ge=0)] = 0.0
    c_s: Annotated[float, Meta(ge=0)] = 0.0

    def line(self) -> Line:
        """The same for the formulas."""
        if self.a_s + self.b_s + self.c_s <= 0:
            raise ConfigError("a step must take time; give at least one of a_s, b_s, c_s above 0")
        return Line(self.a_s, self.b_s, self.c_s)


class Linear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Step times by coefficients."""

    prefill: Coefficients
    decode: Coefficients


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be said to a plugin."""

    strategy: str = "on-time+late+headroom+envelope"
    """In force until the control plane names another."""
    ttft_s: Positive | None = 2.0
    tpot_s: Positive | None = 0.05
    classes: dict[str, Targets] = {}
    """SLO classes that requests name."""
    linear: Linear | None = None
    model: str | None = None
    """Path of a trained model."""
    gpu: str | None = None
    """Parts of the profile that the engine does not tell as telemetry has them; None: as the engine says."""
    model_name: str | None = None
    precision: str | None = None
    control_plane: str | None = None
    """Its address; None: alone."""
    deferred_share: Share = 0.05
    decision_budget_s: Positive = 0.01
    longest_hold_s: Annotated[float, Meta(gt=0, le=10)] = 5.0
    """No request is held longer. Well below the 30 s for which a prefill engine keeps KV for its decode engine."""
    status_dir: str | None = None
    """Where `kairos doctor` finds what the plugin does; None: a folder of this user below the temporary one."""

    def targets(self, slo_class: str) -> tuple[float, float]:
        """TTFT and TPOT target of a class, the defaults for a class that nobody described."""
        found = self.classes.get(slo_class)
        return (found or Targets(self.ttft_s, self.tpot_s)).numbers()

    def targets_of(self, slo_class: str, told: Mapping[str, Any]) -> tuple[float, float]:
        """The targets of a request: what it says itself (`kairos_ttft_s`, `kairos_tpot_s`), else those of its class."""
        ttft_s, tpot_s = self.targets(slo_class)
        return _seconds(told.get("kairos_ttft_s"), ttft_s), _seconds(told.get("kairos_tpot_s"), tpot_s)

    def profile(self, told: Profile) -> Profile:
        """The profile as the engine tells it, with what is set here in its place."""
        return msgspec.structs.replace(
            told,
            gpu=self.gpu or told.gpu,
            model=self.model_name or told.model,
            precision=told.precision if self.precision is None else self.precision,
        )

    def step_times(self, profile: Profile) -> StepTimes:
        """Coefficients if there are any, else the model's, else what bandwidth, FLOPs and model size say.

        Raises:
            InputError: the model cannot be read, or a line takes no time.
        """
        if self.linear is not None:
            return LinearStepTimes(self.linear.prefill.line(), self.linear.decode.line())
        known = Predictors([]) if self.model is None else load(Path(self.model))
        return known.profile(profile)

    def status_folder(self) -> Path:
        """The folder of status files."""
        return Path(self.status_dir or Path(tempfile.gettempdir(), f"kairos-{os.getuid()}"))


def load_settings(environment: Mapping[str, str] = os.environ) -> EngineSettings:
    """The file that KAIROS_ENGINE_CONFIG names, if any, with every KAIROS_ENGINE_... variable in place of its setting.

    Raises:
        ConfigError: a setting that does not exist or does not fit; the message names it.
    """
    told: dict[str, Any] = {}
    path = environment.get(FILE)
    if path:
        told = _read(path)
    known = EngineSettings.__struct_fields__
    for name, value in environment.items():
        if not name.startswith(PREFIX) or name == FILE:
            continue
        field = name.removeprefix(PREFIX).lower()
        if field not in known:
            raise ConfigError(f"{name} sets nothing; there are: {', '.join(PREFIX + f.upper() for f in known)}")
        told[field] = _value(value)
    try:
        settings = msgspec.convert(told, EngineSettings, strict=False)
    except msgspec.ValidationError as problem:
        raise ConfigError(f"engine settings{f' in {path}' if path else ''}: {problem}") from None
    if settings.linear is not None and settings.model is not None:
        raise ConfigError("engine settings: give linear or model, not both")
    return settings


def _read(path: str) -> dict[str, Any]:
    try:
        told = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError(f"cannot read the engine settings {path}: {' '.join(reason.split())}") from None
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise ConfigError(f"the engine settings {path} hold {type(told).__name__}; write names and values")
    return told


def _value(text: str) -> Any:
    """A variable's value, read as YAML; a number that YAML 1.1 takes for text stays text and is converted later."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _seconds(told: Any, default_s: float) -> float:
    """A target in a request's own words; numbers may come as text, and what is no positive number is left alone."""
    try:
        seconds = float(told)
    except (TypeError, ValueError):
        return default_s
    return seconds if seconds > 0 else default_s
