"""The thread beside an engine: writes the status, speaks with the control plane."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from kairos.adapters.control_plane import ControlPlane
from kairos.adapters.embedded.status import EngineStatus, write

PERIOD_S = 2.0

_log = logging.getLogger(__name__)


class Background:
    """Runs until it is closed, or the process ends."""

    def __init__(self, status: Callable[[], EngineStatus], folder: Path, control_plane: ControlPlane | None) -> None:
        self._parts: list[Callable[[], None]] = [lambda: write(status(), folder)]
        if control_plane is not None:
            self._parts.append(control_plane.exchange)
        self._ending = threading.Event()
        self._told: set[type[Exception]] = set()
        self._thread = threading.Thread(target=self._run, name="kairos", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say and send what is left, for at most two seconds."""
        self._ending.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self._ending.wait(PERIOD_S):
            self._once()
        self._once()

    def _once(self) -> None:
        for part in self._parts:
            try:
                part()
            except Exception as problem:  # the thread's top: the other part, and this one next time, may work
                if type(problem) not in self._told:
                    _log.warning("kairos: %s; said once", problem, exc_info=problem)
                self._told.add(type(problem))
