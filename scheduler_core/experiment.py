"""What the control plane and the data planes of a live experiment share: what runs when, and its signature.

Times are seconds on the experiment's one clock (`Clock`); all but its `now_s` are handed them. The champion is arm A,
the challenger arm B.
"""

import hashlib
import hmac
import time
from bisect import bisect_right
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from kairos.scheduler_core.errors import InputError

ANCHOR_S = 1_767_225_600.0
"""2026-01-01T00:00:00Z, where every scale agrees with UTC."""


class Clock(NamedTuple):
    """The one clock of experiments: slots, arrivals and reports are told in its seconds.

    At scale 1 it is UTC epoch time. A simulated fleet may run faster: it and the control plane then share a scale, and
    with the fixed anchor the same instant is the same second in every process and after a restart.
    """

    scale: float = 1.0
    """`service.clock_scale`."""

    def now_s(self) -> float:
        """This instant, in experiment seconds since the epoch."""
        return self.at(time.time())

    def at(self, utc_s: float) -> float:
        """An instant of UTC, in experiment seconds since the epoch.

        >>> Clock(60.0).at(ANCHOR_S + 2.0) - ANCHOR_S
        120.0
        """
        return ANCHOR_S + (utc_s - ANCHOR_S) * self.scale

    def in_s(self, real_s: float) -> float:
        """The instant so many real seconds from now."""
        return self.at(time.time() + real_s)


def iso(at_s: float) -> str:
    """An instant of the clock as people and records write it.

    >>> iso(ANCHOR_S)
    '2026-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Slot(msgspec.Struct, frozen=True):
    """A stretch of time and what runs in it."""

    start_s: float
    end_s: float
    arms: str
    """Of the fleet (`A`), or of pool 1 and pool 2 (`AB`); empty for `sticky`, where each session has its own."""
    share: float
    """The stage's."""
    pair: int | None
    """Which pair it belongs to; None: it counts for none."""


class Schedule(msgspec.Struct, frozen=True):
    """What runs when, pre-drawn: a data plane needs nothing else to know its arm."""

    experiment_id: str
    seed: int
    champion: str
    challenger: str
    generation: int
    slots: tuple[Slot, ...]

    def strategy_at(self, now_s: float, pool: int = 0) -> str:
        """What runs in a pool (0 or 1; 0 for a whole fleet) at this time; outside all slots the champion."""
        slot = self.slot_at(now_s)
        return self.challenger if slot and slot.arms[pool] == "B" else self.champion

    def strategy_of(self, session_id: str, now_s: float) -> str:
        """`sticky`: what serves a session that begins now, for its life; outside all slots the champion."""
        slot = self.slot_at(now_s)
        place = drawn(self.experiment_id, self.seed, f"session {session_id}")
        return self.challenger if slot and place < slot.share else self.champion

    def slot_at(self, now_s: float) -> Slot | None:
        """The slot that this time lies in; None outside all."""
        latest = bisect_right(self.slots, now_s, key=lambda slot: slot.start_s) - 1
        return self.slots[latest] if latest >= 0 and now_s < self.slots[latest].end_s else None


def sign(schedule: Schedule, key: bytes) -> bytes:
    """The schedule as one line of text that cannot be changed without the key."""
    body = msgspec.json.encode(schedule)
    return _signature(body, key) + b"." + body


def read_schedule(signed: bytes, key: bytes) -> Schedule:
    """The schedule of a text that `sign` made.

    Raises:
        InputError: it was changed, or made with another key.
    """
    signature, _, body = signed.partition(b".")
    if not hmac.compare_digest(signature, _signature(body, key)):
        raise InputError("the schedule does not carry our signature; run the champion and fetch the schedule again")
    return msgspec.json.decode(body, type=Schedule)


def _signature(body: bytes, key: bytes) -> bytes:
    return hmac.new(key, body, hashlib.sha256).hexdigest().encode()


def drawn(experiment_id: str, seed: int, what: str) -> float:
    """A fixed number in [0, 1) for each experiment, seed and name: the same after a restart and on every replica."""
    digest = hashlib.sha256(f"{experiment_id}/{seed}/{what}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56
