"""Which blocks of prompts an engine has in its KV cache by its own word: the events that vLLM and SGLang publish.

Frames over ZMQ (PUB): a topic, a sequence number of 8 bytes, big endian, and a MessagePack batch: time, events, rank.
Events are maps with a `type`, or arrays that begin with it. A ROUTER socket sends earlier batches again: asked with
an empty frame and the first number wanted, it answers with an empty frame, the topic (which older ones leave out), the
number and the batch for each, and with the number -1 at last.

Engines' hashes are their own, so blocks are known here by salted hashes of their tokens.

Source: vLLM 0.12 to 0.33, `vllm/distributed/kv_events.py`; SGLang 0.5 publishes the same.
"""

import logging
import os
import threading
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import zmq

_log = logging.getLogger(__name__)

_SALT = os.urandom(16)
_POLL_MS = 100
_REPLAY_MS = 1_000
"""A publisher that takes longer to send an earlier batch again does not."""
_END = (-1).to_bytes(8, "big", signed=True)
_MOST_BLOCKS = 2_000_000
"""No engine holds so many; one that seems to has not told of what left."""

_STORED = (
    *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    *("extra_keys", "group_idx"),
)
_REMOVED = ("block_hashes", "medium", "group_idx")


def token_blocks(tokens: Sequence[int], block_tokens: int, adapter: str = "") -> list[bytes]:
    """Ids of the whole blocks of a prompt of tokens; those of another adapter are others.

    >>> token_blocks([1, 2, 3, 4, 5], 2) == token_blocks([1, 2, 3, 4], 2)
    True
    """
    ids: list[bytes] = []
    parent = adapter.encode()
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = _block_after(parent, tokens[start : start + block_tokens])
        ids.append(parent)
    return ids


def _block_after(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=8, key=_SALT).digest()


class StoredBlocks:
    """The blocks of one engine. Written by one thread; looked at by any."""

    def __init__(self) -> None:
        self.block_tokens = 0
        """Tokens of a block; 0: not known yet."""
        self.clear()

    def __len__(self) -> int:
        return len(self._stored)

    def clear(self) -> None:
        """Nothing is known."""
        self._by_hash: dict[object, bytes] = {}
        self._stored: set[bytes] = set()

    def hit_tokens(self, blocks: Sequence[bytes]) -> int:
        """Tokens of the leading blocks that are there."""
        hits = 0
        for block in blocks:
            if block not in self._stored:
                break
            hits += 1
        return hits * self.block_tokens

    def apply(self, events: Sequence[object]) -> None:
        """Take in the events of a batch, in their order.

        Raises:
            ValueError, TypeError, LookupError: one is of no known form.
        """
        for event in events:
            kind, told = _read(event)
            if kind == "AllBlocksCleared":
                self.clear()
            elif told.get("medium") not in (None, "GPU") or told.get("group_idx"):
                continue  # blocks elsewhere, and those of a hybrid model's other layers
            elif kind == "BlockStored":
                self._store(told)
            elif kind == "BlockRemoved":
                for block_hash in told["block_hashes"]:
                    self._stored.discard(self._by_hash.pop(block_hash, b""))

    def _store(self, told: dict[str, Any]) -> None:
        tokens, self.block_tokens = told["token_ids"], int(told["block_size"])
        before = told["parent_block_hash"]
        adapter = told.get("lora_name") or ""
        parent = adapter.encode() if before is None else self._by_hash.get(before)
        extra = told.get("extra_keys") or ()
        for place, block_hash in enumerate(told["block_hashes"]):
            keys = (extra[place] if place < len(extra) else None) or ()
            if parent is None or any(key != adapter for key in keys):
                return  # after a block that nobody told of, or with an image or a salt in it
            parent = _block_after(parent, tokens[place * self.block_tokens : (place + 1) * self.block_tokens])
            self._by_hash[block_hash] = parent
            self._stored.add(parent)
        if len(self._stored) > _MOST_BLOCKS:
            self.clear()


def _read(event: object) -> tuple[str, dict[str, Any]]:
    if isinstance(event, dict):
        return str(event["type"]), event
    if not isinstance(event, list):
        raise ValueError("an event is neither a map nor an array")
    kind = str(event[0])
    return kind, dict(zip(_STORED if kind == "BlockStored" else _REMOVED, event[1:], strict=False))


class KvEventReader:
    """Hears one publisher, in a thread of its own; it may come and go, and is asked for all it has when it comes.

    Args:
        address: of its events, tcp://HOST:PORT.
        replay_address: where it sends earlier ones again; empty: nowhere, so a gap forgets everything.
    """

    def __init__(self, address: str, replay_address: str = "") -> None:
        self.stored = StoredBlocks()
        self.counts = Counter[str]()
        """Batches that were heard, replayed, missed (and not replayed) or unreadable."""
        self._address, self._replay_address = address, replay_address
        self._sequence = -1
        self._told_s = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kairos-kv-events {address}", daemon=True)

    def start(self) -> None:
        """Begin to hear."""
        self._thread.start()

    def close(self) -> None:
        """Hear no more."""
        self._ending.set()

    def _run(self) -> None:
        import zmq
        from zmq.utils.monitor import recv_monitor_message

        context: zmq.Context[Any] = zmq.Context.instance()
        try:
            with context.socket(zmq.SUB) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SUBSCRIBE, b"")
                comings = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
                socket.connect(self._address)
                while not self._ending.is_set():
                    if comings.poll(0):
                        recv_monitor_message(comings)
                        self._forget()
                        self._replay(context, 0)
                    if socket.poll(_POLL_MS):
                        self._hear(context, socket.recv_multipart())
                socket.disable_monitor()
        except Exception as problem:  # the thread's top
            self.stored.clear()
            _log.warning("KV events of %s: %s; its prefixes are guessed from now on", self._address, problem)

    def _forget(self) -> None:
        self.stored.clear()
        self._sequence, self._told_s = -1, 0.0

    def _hear(self, context: "zmq.Context[Any]", frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self.counts["unreadable"] += 1
            return
        number = int.from_bytes(frames[1], "big")
        if number <= self._sequence:
            if _time_of(frames[2]) <= self._told_s:
                return  # it was replayed
            self._forget()  # the engine began anew
            self._replay(context, 0)
        if number > self._sequence + 1:
            if self._sequence >= 0:
                self._replay(context, self._sequence + 1)
            if self._sequence >= 0 and number > self._sequence + 1:
                self.counts["missed"] += number - self._sequence - 1
                self.stored.clear()  # something may have left since
        if number > self._sequence:
            self.counts["heard"] += 1
            self._take(number, frames[2])

    def _take(self, number: int, payload: bytes) -> None:
        self._sequence = number
        try:
            told_s, events = _batch(payload)
            self._told_s = max(self._told_s, told_s)
            self.stored.apply(events)
        except (msgspec.MsgspecError, ValueError, TypeError, LookupError, OverflowError):
            self.counts["unreadable"] += 1
            self.stored.clear()

    def _replay(self, context: "zmq.Context[Any]", first: int) -> None:
        """Take in the batches from a number on, as far as they can be had."""
        if not self._replay_address:
            return
        import zmq

        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._replay_address)
            socket.send_multipart([b"", first.to_bytes(8, "big")])
            while not self._ending.is_set() and socket.poll(_REPLAY_MS):
                number, payload = socket.recv_multipart()[-2:]
                if number == _END:
                    return
                place = int.from_bytes(number, "big")
                if self._sequence >= 0 and place > self._sequence + 1:
                    return  # it does not keep what is missing
                if place > self._sequence:
                    self.counts["replayed"] += 1
                    self._take(place, payload)


def _batch(payload: bytes) -> tuple[float, list[object]]:
    batch = msgspec.msgpack.decode(payload)
    told_s, events = (batch["ts"], batch["events"]) if isinstance(batch, dict) else (batch[0], batch[1])
    return float(told_s), events


def _time_of(payload: bytes) -> float:
    try:
        return _batch(payload)[0]
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError):
        return 0.0
