"""How an emulated worker takes part in a prefill/decode handshake: what a request's fields ask of it.

NIXL and Mooncake: `kv_transfer_params` of vLLM. SGLang: `bootstrap_host`, `bootstrap_port`, `bootstrap_room`.
"""

from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from kairos.adapters.emulator.prompts import BadRequest

Connector = Literal["nixl", "mooncake", "sglang"]


@dataclass(frozen=True, slots=True)
class Leg:
    """One leg of a handshake."""

    produces: bool
    """The prefill leg; otherwise decode."""
    key: str
    source: str = ""
    """Decode: the address that holds the KV."""
    waits: bool = False
    """Both legs come at once: decode waits for prefill to end."""
    needs_decode_first: bool = False
    """Prefill begins only when decode has asked."""


def leg_of(body: dict[str, Any], connector: Connector | None) -> Leg | None:
    """The leg that a request is; None: it is served here alone.

    Raises:
        BadRequest: its fields do not make a handshake.
        TypeError: `kv_transfer_params` is no mapping; vLLM fails (500) on that too.
    """
    if connector == "sglang":
        return _sglang(body)
    params = body.get("kv_transfer_params")
    if params is None or connector is None:
        return None
    if not isinstance(params, dict):
        raise TypeError("kv_transfer_params is no mapping")
    if params.get("do_remote_decode"):
        key = _text(params, "transfer_id") if connector == "mooncake" else uuid4().hex
        return Leg(produces=True, key=key)
    if not params.get("do_remote_prefill"):
        return None
    if connector == "mooncake":
        return Leg(False, _text(params, "transfer_id"), _text(params, "remote_bootstrap_addr"), waits=True)
    source = f"http://{_text(params, 'remote_host')}:{params.get('remote_port')}"
    return Leg(False, _text(params, "remote_request_id"), source)


def _sglang(body: dict[str, Any]) -> Leg | None:
    room = body.get("bootstrap_room")
    if room is None:
        return None
    if not isinstance(room, int):
        raise BadRequest("bootstrap_room must be an integer")
    source = f"http://{body.get('bootstrap_host')}:{body.get('bootstrap_port')}"
    return Leg(False, str(room), source, waits=True, needs_decode_first=True)


def _text(params: dict[str, Any], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"kv_transfer_params.{name} is missing")
    return value


def nixl_params(engine_id: str, key: str, host: str, port: int, tokens: int, expires_at_s: float) -> dict[str, Any]:
    """What a NIXL prefill engine answers for the decode engine to take the KV with."""
    blocks = -(-tokens // 16)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": list(range(blocks)),
        "remote_engine_id": engine_id,
        "remote_request_id": key,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "remote_num_tokens": tokens,
        "remote_blocks_expiry_time": expires_at_s,
    }
