"""Forward-pass metrics into steps: what Dynamo's vLLM scheduler, SGLang and Kairos' own plugin send.

The subscriber sees what it missed by the sequence numbers.
"""

from collections import Counter
from typing import Any

import msgspec

from kairos.adapters.forward_pass import ForwardPass, message_of, sequence_of
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.telemetry import StepRow

_KEPT_MESSAGES = 100_000
"""That may wait between two looks: half an hour of steps of 20 ms."""


class StepReader:
    """Makes steps of the messages of one publisher, in their order."""

    def __init__(self, profile: Profile, run: str) -> None:
        self._profile = profile
        self._run = run
        self._sequence: int | None = None
        self._phase = ""
        self.counts: Counter[str] = Counter()
        """missed, unreadable."""

    def step(self, frames: list[bytes]) -> StepRow | None:
        """The step of a message; None for a heartbeat, and for one that cannot be read (which is counted)."""
        message = self._read(frames)
        if message is None:
            self.counts["unreadable"] += 1
            self._phase = ""
            return None
        scheduled, before = message.scheduled_requests, self._phase
        self._phase = _phase(message)
        if message.wall_time <= 0 or self._phase == "idle":
            return None
        p = self._profile
        try:
            return msgspec.convert(
                {
                    **{"gpu": p.gpu, "model": p.model, "precision": p.precision, "tp": p.tp, "ep": p.ep},
                    **{"engine": p.engine, "run": self._run, "prev_phase": before},
                    "latency_ms": message.wall_time * 1e3,
                    "n_requests": scheduled.num_prefill_requests,
                    "new_tokens": scheduled.sum_prefill_tokens,
                    "cached_tokens": scheduled.sum_prefill_kv_tokens,
                    "batch_size": scheduled.num_decode_requests,
                    "sum_context_tokens": scheduled.sum_decode_kv_tokens,
                },
                StepRow,
            )
        except msgspec.ValidationError:
            self.counts["unreadable"] += 1
            return None

    def _read(self, frames: list[bytes]) -> ForwardPass | None:
        sequence = sequence_of(frames)
        if sequence is None:
            return None
        expected = sequence if self._sequence is None else self._sequence + 1
        self._sequence = sequence
        if sequence != expected:  # lower: the publisher began anew
            self.counts["missed"] += max(0, sequence - expected)
            self._phase = ""
        return message_of(frames)


def _phase(message: ForwardPass) -> str:
    """Which of `PHASES` a step was."""
    prefill, decode = message.scheduled_requests.num_prefill_requests, message.scheduled_requests.num_decode_requests
    if prefill and decode:
        return "mixed"
    return "context" if prefill else "decode" if decode else "idle"


class Subscriber:
    """Hears one publisher; it may come and go.

    Args:
        address: tcp://HOST:PORT or ipc://PATH.
        profile: of the engine; messages do not tell it.
        run: the recording that the steps belong to.

    Raises:
        ConfigError: the address cannot be.
    """

    def __init__(self, address: str, profile: Profile, run: str) -> None:
        import zmq

        self._again = zmq.Again
        self._reader = StepReader(profile, run)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set_hwm(_KEPT_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._no_wait = zmq.NOBLOCK
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"forward_pass '{address}': {error}; give tcp://HOST:PORT or ipc://PATH") from None

    @property
    def counts(self) -> Counter[str]:
        """Messages that were missed or cannot be read, since the start."""
        return self._reader.counts

    def steps(self) -> list[StepRow]:
        """Those since the last call."""
        rows: list[StepRow] = []
        for _ in range(_KEPT_MESSAGES):
            try:
                frames: Any = self._socket.recv_multipart(self._no_wait)
            except self._again:
                break
            if (row := self._reader.step(frames)) is not None:
                rows.append(row)
        return rows

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()
