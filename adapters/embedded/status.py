"""What a plugin does, for people: counted by the engine's thread, written to a file that `kairos doctor` reads."""

import os
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

NEWEST = 4096
"""Steps that the percentiles are of."""
STALE_S = 10.0
"""A file that was not written for so long is of an engine that hangs or is gone."""


class Durations:
    """The newest durations, in seconds."""

    def __init__(self) -> None:
        self._seconds = array("d", bytes(8 * NEWEST))
        self.count = 0

    def add(self, seconds: float) -> None:
        """Note one."""
        self._seconds[self.count % NEWEST] = seconds
        self.count += 1

    def percentiles(self) -> tuple[float, float]:
        """Median and p99; NaN without any."""
        known = np.frombuffer(self._seconds, np.float64)[: self.count].copy()
        if not len(known):
            return float("nan"), float("nan")
        p50, p99 = np.percentile(known, (50, 99))
        return float(p50), float(p99)


class EngineStatus(msgspec.Struct, frozen=True):
    """One plugin in one engine's process."""

    kairos: str
    engine: str
    engine_version: str
    tested: bool
    """Whether this version of the engine is one that the plugin was run with."""
    pid: int
    run: str
    written_s: float
    """UTC epoch."""
    started_s: float
    profile_id: str
    strategy: str
    step_times: str
    """Where they come from."""
    decides: list[str]
    stops_stalls: bool
    """Whether a decision is stopped at its budget, or only noticed."""
    steps: int
    step_p50_s: float | None
    overhead_p50_s: float | None
    overhead_p99_s: float | None
    counts: dict[str, int]
    fallbacks: dict[str, int]
    control_plane: str | None
    reached_s: float | None
    exchanged: dict[str, int]

    @property
    def is_alive(self) -> bool:
        """Whether its process runs and still writes."""
        return time.time() - self.written_s < STALE_S and _runs(self.pid)


def write(status: EngineStatus, folder: Path) -> None:
    """Write the file of this plugin, whole or not at all; files of processes that are gone are taken away.

    Raises:
        OSError: the place cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{status.pid}-{status.run}.json"
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(status))
    part.replace(path)
    for other in folder.glob("*.json"):
        pid = other.stem.partition("-")[0]
        if pid.isdigit() and not _runs(int(pid)):
            other.unlink(missing_ok=True)


def read_all(folder: Path) -> list[EngineStatus]:
    """The status of every plugin that wrote to the folder, by process; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=EngineStatus))
        except (OSError, msgspec.MsgspecError):
            continue  # being taken away, or of another version of Kairos
    return found


def number(seconds: float) -> float | None:
    """A number as JSON has it."""
    return None if seconds != seconds else seconds


def as_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """A copy by name, taken while another thread counts on."""
    return dict(sorted(dict(counts).items()))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def spoken(status: EngineStatus) -> dict[str, Any]:
    """The status for `kairos doctor --json`."""
    told: dict[str, Any] = msgspec.to_builtins(status)
    return told | {"is_alive": status.is_alive}
