"""What each engine is told, by handshake (docs/gateway.md): vLLM's NIXL and Mooncake, SGLang's bootstrap, or nothing.

The names of engines' fields and headers occur in this file, in `health.py` and nowhere else.
"""

import random
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.instances import LiveInstance
from kairos.adapters.gateway.stream import Usage
from kairos.adapters.http_client import Headers

_HIGHEST = 2**31 - 1
_rooms = random.SystemRandom()


class Message(NamedTuple):
    """A request to an engine."""

    lines: bytes
    """Its headers."""
    body: bytes


class PrefillAnswer(msgspec.Struct, gc=False):
    """What matters of a prefill engine's answer."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: Usage | None = None


_prefill_answer = msgspec.json.Decoder(PrefillAnswer).decode


def alone(call: Call, instance: LiveInstance) -> Message:
    """The request for an engine that does both."""
    return Message(_lines(call, instance), call.body.whole(_priority(call, instance)))


def nixl_prefill(call: Call, prefill: LiveInstance) -> Message:
    """The first leg of NIXL's serial handshake."""
    params = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return _prefill_leg(call, prefill, params)


def nixl_params(body: bytes) -> tuple[msgspec.Raw, Usage | None]:
    """What the first leg answered for the second.

    Raises:
        CallError: nothing that one could hand over.
    """
    try:
        answer = _prefill_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = PrefillAnswer()
    if bytes(answer.kv_transfer_params) == b"null":
        raise CallError(502, "no_kv", "the prefill engine handed no KV over; is it started with a NIXL connector?")
    return answer.kv_transfer_params.copy(), answer.usage


def nixl_decode(call: Call, decode: LiveInstance, params: msgspec.Raw) -> Message:
    """The second leg: the whole request, with what the first answered."""
    extra = _priority(call, decode) | {"kv_transfer_params": params}
    return Message(_lines(call, decode), call.body.whole(extra))


def both_legs(call: Call, prefill: LiveInstance, decode: LiveInstance) -> tuple[Message, Message]:
    """Both legs of a handshake in which they are sent at once."""
    return _sglang(call, prefill, decode) if prefill.handshake == "sglang" else _mooncake(call, prefill, decode)


def passed_on(headers: Headers, instance: LiveInstance) -> Headers:
    """The headers of a request that is relayed as it is."""
    return [*headers, *instance.key_header]


def _mooncake(call: Call, prefill: LiveInstance, decode: LiveInstance) -> tuple[Message, Message]:
    transfer = uuid4().hex
    first = _prefill_leg(call, prefill, {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer})
    first = Message(first.lines + b"x-data-parallel-rank: 0\r\n", first.body)
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_bootstrap_addr": prefill.bootstrap_address,
        "remote_engine_id": prefill.mooncake_engine_id,
        "transfer_id": transfer,
    }
    extra = _priority(call, decode) | {"kv_transfer_params": params}
    return first, Message(_lines(call, decode), call.body.whole(extra))


def _sglang(call: Call, prefill: LiveInstance, decode: LiveInstance) -> tuple[Message, Message]:
    place = {
        "bootstrap_host": prefill.http.host,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": _rooms.getrandbits(63),
    }
    body = call.body.whole(_priority(call, prefill) | place)
    same = prefill.passes_priority == decode.passes_priority
    other = body if same else call.body.whole(_priority(call, decode) | place)
    return Message(_lines(call, prefill), body), Message(_lines(call, decode), other)


def _prefill_leg(call: Call, prefill: LiveInstance, params: dict[str, Any]) -> Message:
    extra = _priority(call, prefill) | {"kv_transfer_params": params}
    return Message(_lines(call, prefill), call.body.prefill_leg(extra))


def _priority(call: Call, instance: LiveInstance) -> dict[str, Any]:
    """The order in which Kairos sent them, for an engine that orders by priority: vLLM lowest first, SGLang highest."""
    if not instance.passes_priority:
        return {}
    rank = call.dispatch_rank % _HIGHEST
    return {"priority": _HIGHEST - rank if instance.engine == "sglang" else rank}


def _lines(call: Call, instance: LiveInstance) -> bytes:
    return b"content-type: application/json\r\nx-request-id: %b\r\n%b%b" % (
        call.request_id.encode(),
        call.trace_lines,
        instance.key_line,
    )
