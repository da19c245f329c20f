"""A thread that a part of the control plane runs between its start and its stop."""

from collections.abc import Callable
from threading import Event, Thread


class Background:
    """Work in a thread of its own; it may be started again after a stop.

    Args:
        run: the work; it returns soon after `stopped` is set.
    """

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self._name, self._run = name, run
        self.stopped = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin."""
        self.stopped.clear()
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return once the work has ended."""
        self.stopped.set()
        if self._thread is not None:
            self._thread.join()
