"""What policies and guards remember between two answers: one opaque text that the caller keeps."""

import base64

import msgspec

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.errors import FieldsError


class LaneMemory(msgspec.Struct):
    """Of one prefill instance."""

    rule: str = ""
    """State of its prefill policy, as JSON."""
    bucket_s: float = 0.0
    """What the share guard has saved up."""
    pinned: RequestId | None = None
    owed: RequestId | None = None
    """Who waited for its due while the step ran that was decided last."""
    started: tuple[float, RequestId] | None = None
    """The latest arrival started from its own queue."""


class PoolMemory(msgspec.Struct):
    """Of the queue that prefill instances share."""

    rule: str = ""
    started: tuple[float, RequestId] | None = None


class Memory(msgspec.Struct, omit_defaults=True):
    """Everything remembered under one strategy; policies' states as JSON."""

    strategy: str
    fleet: dict[str, str] = {}
    """Of placement and admission, by kind."""
    pools: dict[str, PoolMemory] = {}
    lanes: dict[str, LaneMemory] = {}
    decode: dict[str, str] = {}


_decoder = msgspec.json.Decoder(Memory)
_encoder = msgspec.json.Encoder()


def read_memory(state: str) -> Memory:
    """The memory of a text that `write_memory` made.

    Raises:
        FieldsError: it is no such text.
    """
    try:
        return _decoder.decode(base64.urlsafe_b64decode(state))
    except (ValueError, msgspec.DecodeError):
        raise unusable_state() from None


def write_memory(memory: Memory) -> str:
    """The memory as one line of text."""
    return base64.urlsafe_b64encode(_encoder.encode(memory)).decode()


def unusable_state() -> FieldsError:
    """The error for a state that did not come from here."""
    return FieldsError([("state", "is not a state of an earlier answer; hand it back as it came, or leave it out")])
