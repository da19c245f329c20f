"""Forward-pass metrics, version 1: the message of a step that Dynamo's vLLM scheduler, SGLang and Kairos' plugin send.

Three frames over ZMQ (PUB): an empty topic, a sequence number of 8 bytes, big endian, and a MessagePack map. One
message a step; an idle engine sends heartbeats with a wall time of 0.

Source: field names, frames and meaning from ai-dynamo 1.6.1, `dynamo.common.forward_pass_metrics`.
"""

from collections.abc import Sequence

import msgspec

VERSION = 1


class Scheduled(msgspec.Struct, frozen=True, gc=False):
    """Requests of the step; lengths of prompts, and KV that is there before it, in tokens."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class Queued(msgspec.Struct, frozen=True, gc=False):
    """Requests that wait; decode: preempted ones and those whose KV is on its way."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class ForwardPass(msgspec.Struct, frozen=True, gc=False):
    """One message."""

    version: int = VERSION
    worker_id: str = ""
    dp_rank: int = 0
    counter_id: int = 0
    """The sequence number of its frames."""
    wall_time: float = 0.0
    """Seconds of the step; 0: a heartbeat."""
    scheduled_requests: Scheduled = Scheduled()
    queued_requests: Queued = Queued()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ForwardPass)


def frames_of(message: ForwardPass) -> list[bytes]:
    """A message as it is sent.

    >>> frames = frames_of(ForwardPass(counter_id=7, wall_time=0.01))
    >>> sequence_of(frames), message_of(frames).wall_time
    (7, 0.01)
    """
    return [b"", message.counter_id.to_bytes(8, "big"), _encoder.encode(message)]


def sequence_of(frames: Sequence[bytes]) -> int | None:
    """The sequence number; None when these are no frames of such a message."""
    return int.from_bytes(frames[1], "big") if len(frames) == 3 and len(frames[1]) == 8 else None


def message_of(frames: Sequence[bytes]) -> ForwardPass | None:
    """The message; None when it cannot be read or is of another version."""
    try:
        message = _decoder.decode(frames[2])
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return message if message.version == VERSION else None
