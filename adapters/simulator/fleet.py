"""The simulated fleet: instances, which models they serve, and the links between them, from the configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kairos.scheduler_core.config import DecodeGroup, Handover, KvTransfer, PrefillGroup, Settings
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, DecodeInstance, PrefillInstance, StepTimes
from kairos.scheduler_core.errors import ConfigError

StepTimesOf = Callable[[Settings, str], StepTimes]
"""The step times of a profile of the configuration, by its name there."""


@dataclass(frozen=True, slots=True)
class PrefillUnit:
    """A prefill instance with what only the simulator needs to know."""

    instance: PrefillInstance
    serves: frozenset[str]
    cache_tokens: int
    """Capacity of its prefix cache; 0 = off."""
    kv_held_tokens: int
    """KV it may hold for transfer before it waits for decode."""


@dataclass(frozen=True, slots=True)
class DecodeUnit:
    """A decode instance with what only the simulator needs to know."""

    instance: DecodeInstance
    serves: frozenset[str]
    swap_out: Literal["free", "recompute"]


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """All instances, in index order."""

    prefill: Sequence[PrefillUnit]
    decode: Sequence[DecodeUnit]
    kv_transfer: KvTransfer
    handover: Handover


def build_fleet(settings: Settings, step_times_of: StepTimesOf) -> SimulatedFleet:
    """The fleet of a configuration, instances named `prefill-0`, `decode-0` and so on.

    Raises:
        ConfigError: it has mixed instances, which are not simulated.
    """
    if settings.fleet.mixed:
        raise ConfigError("fleet.mixed: mixed instances are not simulated; give prefill and decode instances")
    prefill: list[PrefillUnit] = []
    decode: list[DecodeUnit] = []
    for group in settings.fleet.prefill:
        times = step_times_of(settings, group.profile)
        prefill.extend(_prefill_unit(settings, group, times, len(prefill) + n) for n in range(group.count))
    for decode_group in settings.fleet.decode:
        times = step_times_of(settings, decode_group.profile)
        decode.extend(_decode_unit(settings, decode_group, times, len(decode) + n) for n in range(decode_group.count))
    return SimulatedFleet(prefill, decode, settings.fleet.kv_transfer, settings.fleet.handover)


def _prefill_unit(settings: Settings, group: PrefillGroup, times: StepTimes, index: int) -> PrefillUnit:
    instance = PrefillInstance(
        f"prefill-{index}", times, group.chunk_tokens, group.max_requests_per_step, group.control
    )
    return PrefillUnit(
        instance,
        frozenset(settings.served_models(group)),
        (group.kv_tokens or 0) if group.prefix_cache else 0,
        group.kv_held_tokens or UNLIMITED_TOKENS,
    )


def _decode_unit(settings: Settings, group: DecodeGroup, times: StepTimes, index: int) -> DecodeUnit:
    instance = DecodeInstance(
        f"decode-{index}",
        times,
        group.max_batch,
        group.kv_tokens or UNLIMITED_TOKENS,
        group.batch_limit or UNLIMITED_TOKENS,
        group.control,
    )
    return DecodeUnit(instance, frozenset(settings.served_models(group)), group.swap_out)
