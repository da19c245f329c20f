"""What to simulate, as a user says it: trace, fleet, target, load and strategy by name, made into objects."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kairos.adapters.simulator.fleet import SimulatedFleet, build_fleet
from kairos.adapters.simulator.fleets import load_fleet
from kairos.adapters.simulator.tables import Workload
from kairos.adapters.simulator.workload import (
    at_decode_load,
    at_load,
    build_workload,
    parse_target,
    scale_time,
)
from kairos.adapters.traces import Trace, read_trace
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import ConfigError, UnknownNameError
from kairos.scheduler_core.strategy import Strategy, parse_strategy


@dataclass(frozen=True, slots=True)
class Scenario:
    """The arrivals of a run and the fleet they meet; everything that two strategies under comparison share."""

    trace: Path
    fleet: str
    target: str | None = None
    load: float | None = None
    decode_load: float | None = None
    time_scale: float | None = None
    jitter_s: float = 0.0
    jitter_seed: int = 0
    limit_s: float | None = None

    def __post_init__(self) -> None:
        scales = {"load": self.load, "decode-load": self.decode_load, "time-scale": self.time_scale}
        given = [f"--{name}" for name, value in scales.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} all scale time; give one of them")
        if self.limit_s is not None and not (math.isfinite(self.limit_s) and self.limit_s > 0):
            raise ConfigError(f"--duration {self.limit_s:g} is not possible; give a number of seconds above 0")

    @property
    def level(self) -> float | None:
        """The load that the report shows: of prefill, or of decode; None = as recorded."""
        return self.load if self.load is not None else self.decode_load


@lru_cache(maxsize=4)
def settings_of(fleet: str) -> Settings:
    """The configuration behind a fleet's name or path."""
    return load_fleet(fleet)


@lru_cache(maxsize=4)
def fleet_of(fleet: str) -> SimulatedFleet:
    """The instances behind a fleet's name or path.

    Raises:
        ConfigError: it has no prefill or no decode instance.
    """
    settings = settings_of(fleet)
    for role in ("prefill", "decode"):
        if not getattr(settings.fleet, role):
            raise ConfigError(f"fleet '{fleet}' has no {role} instance; add a group under fleet.{role}")
    return build_fleet(settings, step_times_of)


@lru_cache(maxsize=4)
def _trace_of(path: Path) -> Trace:
    return read_trace(path)


@lru_cache(maxsize=4)
def workload_of(scenario: Scenario) -> Workload:
    """What is submitted; the fleet may be one of mixed instances, which is sent to and not simulated."""
    settings = settings_of(scenario.fleet)
    prefill = settings.fleet.prefill or settings.fleet.mixed
    times = step_times_of(settings, prefill[0].profile)
    workload = build_workload(
        _trace_of(scenario.trace),
        settings.slo,
        times,
        None if scenario.target is None else parse_target(scenario.target),
        scenario.jitter_s,
        scenario.jitter_seed,
        scenario.limit_s,
    )
    if scenario.load is not None:
        return at_load(workload, scenario.load, times, sum(group.count for group in prefill))
    if scenario.decode_load is not None:
        decode = settings.fleet.decode or settings.fleet.mixed
        lines = [step_times_of(settings, group.profile).decode_line for group in decode for _ in range(group.count)]
        return at_decode_load(workload, scenario.decode_load, lines)
    return workload if scenario.time_scale is None else scale_time(workload, scenario.time_scale)


def strategy_of(settings: Settings, text: str) -> Strategy:
    """A strategy by its name in the configuration, or by its expression.

    Raises:
        UnknownNameError: neither; says what there is.
        UnknownPolicyError, ConfigError: a policy of it cannot be built.
    """
    if text in settings.strategies:
        return settings.strategies[text].as_strategy(text).check()
    if "+" not in text:
        raise UnknownNameError("strategy", text, settings.strategies)
    return parse_strategy(text).check()


def synthetic(trace: Path) -> bool:
    """Whether a trace was generated."""
    return _trace_of(trace).synthetic


def notes_of(trace: Path) -> list[str]:
    """Counted, named treatments of a trace's rows."""
    return [f"{trace.name}: {what}: {count} rows" for what, count in _trace_of(trace).notes.items() if count]
