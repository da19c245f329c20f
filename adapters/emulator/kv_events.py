"""What an emulated worker publishes of its prefix cache: vLLM's KV events over ZMQ, and earlier ones again on request.

The frames are in `adapters/gateway/kv_events.py`.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from kairos.adapters.emulator.prompts import BLOCK_TOKENS, Prompt
from kairos.scheduler_core.errors import ConfigError

KEPT_BATCHES = 10_000
_POLL_MS = 50


class KvEventPublisher:
    """Publishes batches and sends them again.

    Args:
        port: of the events; 0 takes a free one.
        replay_port: where earlier ones are asked for; 0 takes a free one, None: nowhere.

    Raises:
        ConfigError: a port cannot be had.
    """

    def __init__(self, host: str, port: int, replay_port: int | None) -> None:
        import zmq

        self.muted = False
        """Batches are lost on their way; they can still be asked for."""
        self._sequence = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._ending = threading.Event()
        context: zmq.Context[Any] = zmq.Context.instance()
        self._events = context.socket(zmq.PUB)
        self._events.setsockopt(zmq.LINGER, 0)
        self.port = _bound(self._events, host, port)
        self.replay_port: int | None = None
        self._thread: threading.Thread | None = None
        if replay_port is not None:
            replay = context.socket(zmq.ROUTER)
            replay.setsockopt(zmq.LINGER, 0)
            self.replay_port = _bound(replay, host, replay_port)
            self._thread = threading.Thread(target=self._replay, args=(replay,), name="kairos-replay", daemon=True)
            self._thread.start()

    def stored(self, prompt: Prompt, first: int) -> dict[str, Any]:
        """The event that the blocks of a prompt from a place on were computed."""
        return {
            "type": "BlockStored",
            "block_hashes": list(prompt.blocks[first:]),
            "parent_block_hash": prompt.blocks[first - 1] if first else None,
            "token_ids": prompt.token_ids(first, len(prompt.blocks)),
            "block_size": BLOCK_TOKENS,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }

    def removed(self, blocks: Sequence[int]) -> dict[str, Any]:
        """The event that blocks made room for others."""
        return {"type": "BlockRemoved", "block_hashes": list(blocks), "medium": "GPU"}

    def publish(self, events: list[dict[str, Any]]) -> None:
        """Send a batch."""
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._kept.append((self._sequence, payload))
        if not self.muted:
            self._events.send_multipart([b"", self._sequence.to_bytes(8, "big"), payload])
        self._sequence += 1

    def close(self) -> None:
        """End."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._events.close()

    def _replay(self, socket: Any) -> None:
        with socket:
            while not self._ending.is_set():
                if socket.poll(_POLL_MS):
                    who, _, first = socket.recv_multipart()
                    for number, payload in list(self._kept):
                        if number >= int.from_bytes(first, "big"):
                            socket.send_multipart([who, b"", b"", number.to_bytes(8, "big"), payload])
                    socket.send_multipart([who, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])


def _bound(socket: Any, host: str, port: int) -> int:
    import zmq

    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as problem:
        socket.close()
        raise ConfigError(f"KV events cannot be published on {host}:{port}: {problem}") from None
    return int(socket.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
