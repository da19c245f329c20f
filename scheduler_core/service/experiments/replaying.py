"""Replays in a process of their own, at low priority, so that answers do not wait for them."""

import logging
import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from prometheus_client import Counter

from kairos.scheduler_core.replay import Arrivals, Replay, Replayed
from kairos.scheduler_core.strategy import Strategy

_log = logging.getLogger(__name__)

LONGEST_S = 120.0
NICE = 10


class ReplayProcess:
    """A process that lives from the first replay to `stop`, and ends with this one. For one thread at a time."""

    def __init__(self, replay: Replay, failures: Counter) -> None:
        self._replay = replay
        self._failures = failures
        self._running: tuple[SpawnProcess, Connection] | None = None

    def run(self, strategy: Strategy, arrivals: Arrivals) -> Replayed | None:
        """What became of the arrivals; None: the process died, or took too long."""
        if not len(arrivals):
            return None
        try:
            if self._running is None:
                self._running = self._begin()
            _, connection = self._running
            connection.send((strategy, arrivals))
            if connection.poll(LONGEST_S):
                answer = connection.recv()
                if isinstance(answer, Replayed):
                    return answer
                _log.warning("a replay of %d requests failed: %s", len(arrivals), answer)
            else:
                _log.warning("a replay of %d requests took over %.0f s and was ended", len(arrivals), LONGEST_S)
                self.stop()
        except (OSError, EOFError) as error:
            _log.warning("the process for replays ended (%s); the next replay starts another", error)
            self.stop()
        self._failures.inc()
        return None

    def stop(self) -> None:
        """End the process."""
        running, self._running = self._running, None
        if running is not None:
            process, connection = running
            connection.close()
            process.kill()
            process.join()

    def _begin(self) -> tuple[SpawnProcess, Connection]:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(self._replay, there), name="kairos-replays", daemon=True
        )
        process.start()
        there.close()
        return process, here


def _serve(replay: Replay, connection: Connection) -> None:
    """Answer until the other end is closed, which the end of its process does too."""
    os.nice(NICE)
    while True:
        try:
            strategy, arrivals = connection.recv()
        except EOFError:
            return
        try:
            answer: Replayed | str = replay(strategy, arrivals)
        except Exception as error:  # a policy of a plugin runs in it
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)
