"""Forward-pass metrics, sent as Dynamo's own scheduler class sends them.

vLLM takes one scheduler class, so with Kairos in it the class that Dynamo's planner listens to is not there; where
Dynamo has set its port, Kairos sends the same messages: one a step, and one of zeros a second while idle.
"""

import os
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any

import msgspec

from kairos.adapters.forward_pass import ForwardPass, Queued, Scheduled, frames_of
from kairos.adapters.vllm.report import StepShape
from kairos.scheduler_core.errors import ConfigError

PORT, WORKER = "DYN_FORWARDPASS_METRIC_PORT", "DYN_FPM_WORKER_ID"
IDLE_S = 1.0
KEPT = 10_000


class Sums:
    """Count, sum and variance of whole numbers."""

    __slots__ = ("n", "squares", "total")

    def __init__(self) -> None:
        self.n = self.total = self.squares = 0

    def add(self, value: int) -> None:
        """Take a value in."""
        self.n += 1
        self.total += value
        self.squares += value * value

    @property
    def variance(self) -> float:
        """Of the population; 0 without any.

        >>> s = Sums(); s.add(2); s.add(4); s.variance
        1.0
        """
        return (self.squares - self.total * self.total / self.n) / self.n if self.n else 0.0


def scheduled_of(shape: StepShape) -> Scheduled:
    """The requests of a step."""
    lengths, contexts = Sums(), Sums()
    for entry, _ in shape.prompts:
        lengths.add(entry.prompt_tokens)
    contexts.n, contexts.total, contexts.squares = (
        len(shape.decodes),
        shape.sum_context_tokens,
        shape.sum_square_context,
    )
    return Scheduled(
        lengths.n,
        shape.new_tokens,
        lengths.variance,
        shape.cached_tokens,
        contexts.n,
        contexts.total,
        contexts.variance,
    )


def queued_of(waiting: Iterable[Any]) -> Queued:
    """vLLM's waiting requests."""
    prompts, contexts = Sums(), Sums()
    for request in waiting:
        if request.status.name in ("PREEMPTED", "WAITING_FOR_REMOTE_KVS"):
            contexts.add(request.num_computed_tokens)
        else:
            prompts.add(request.num_tokens)
    return Queued(prompts.n, prompts.total, prompts.variance, contexts.n, contexts.total, contexts.variance)


class Publisher:
    """Sends messages from a thread of its own; the engine's thread puts them into a bounded queue.

    Args:
        counts: where messages are counted that found the queue full.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, port: int, worker_id: str, dp_rank: int, counts: Counter[str]) -> None:
        import zmq  # vLLM brings it along

        self._counts = counts
        self._identity = {"worker_id": worker_id, "dp_rank": dp_rank}
        self._messages: queue.Queue[ForwardPass | None] = queue.Queue(KEPT)
        self._socket: Any = zmq.Context.instance().socket(zmq.PUB)
        self._socket.bind(f"tcp://*:{port + dp_rank}")
        self._thread = threading.Thread(target=self._run, name="kairos-forward-pass", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls, dp_rank: int, counts: Counter[str]) -> "Publisher | None":
        """A publisher where Dynamo has set its port; None elsewhere.

        Raises:
            ConfigError: what is set is no port.
        """
        port = os.environ.get(PORT, "")
        if not port:
            return None
        if not port.isdigit():
            raise ConfigError(f"{PORT} is {port!r}; it is the number of a port")
        return cls(int(port), os.environ.get(WORKER, ""), dp_rank, counts)

    def send(self, seconds: float, scheduled: Scheduled, queued: Queued) -> None:
        """Send one step; a message that finds the queue full is dropped and counted."""
        self._put(ForwardPass(wall_time=seconds, scheduled_requests=scheduled, queued_requests=queued))

    def close(self) -> None:
        """Send what is left, and stop."""
        self._put(None)
        self._thread.join(timeout=1.0)

    def _put(self, message: ForwardPass | None) -> None:
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._counts["dropped forward passes"] += 1

    def _run(self) -> None:
        for number in count():
            try:
                message = self._messages.get(timeout=IDLE_S)
            except queue.Empty:
                message = ForwardPass()
            if message is None:
                break
            stamped = msgspec.structs.replace(message, counter_id=number, **self._identity)
            self._socket.send_multipart(frames_of(stamped))
        self._socket.close(linger=0)
