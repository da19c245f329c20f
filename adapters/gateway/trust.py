"""Who asks, and what they may choose: keys, tenants, SLO classes, and the headers that carry them."""

import hashlib
import ipaddress
import math
import os
import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.errors import CallError
from kairos.scheduler_core.config import GatewaySettings, SloSettings
from kairos.scheduler_core.slo import NO_TARGET_S

Headers = Mapping[bytes, bytes]

_TTFT_HEADERS = (
    (b"x-kairos-ttft-s", 1.0),
    (b"x-slo-ttft-ms", 1e-3),
    (b"x-llm-d-slo-ttft-ms", 1e-3),
    (b"x-dynamo-slo-ttft-ms", 1e-3),
    (b"x-sgl-ttft-slo-ms", 1e-3),
)
_TPOT_HEADERS = (
    (b"x-kairos-tpot-s", 1.0),
    (b"x-slo-tpot-ms", 1e-3),
    (b"x-llm-d-slo-tpot-ms", 1e-3),
    (b"x-dynamo-slo-tpot-ms", 1e-3),
)
_ASKS_FOR_TARGETS = frozenset(name for name, _ in (*_TTFT_HEADERS, *_TPOT_HEADERS))
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})")
_TRACESTATE = re.compile(rb"[\x20-\x7e]{1,512}")
_TENANT = re.compile(rb"[\x21-\x7e]{1,64}")


class Identity(NamedTuple):
    """Who asks."""

    tenant: str
    classes: tuple[str, ...]
    """Those it may choose; the first is its own without a choice."""


class Trust:
    """The gateway's keys and SLO classes."""

    def __init__(self, gateway: GatewaySettings, slo: SloSettings) -> None:
        self._classes = slo.classes
        every = tuple(sorted(slo.classes, key=lambda name: name != "default"))
        self._anyone = Identity("", every)
        self._keys = {
            _digest(entry.key.get_secret_value().encode()): Identity(entry.tenant, entry.classes or every)
            for entry in gateway.keys
        }
        self._proxies = gateway.trusted_proxies

    def identify(self, headers: Headers, client: str) -> Identity:
        """Who asks.

        Raises:
            CallError: nobody that the gateway knows.
        """
        identity = self._anyone
        if self._keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or (known := self._keys.get(_digest(key.strip()))) is None:
                raise CallError(
                    401, "invalid_api_key", "the key is missing or not known; send Authorization: Bearer KEY"
                )
            identity = known
        is_proxy = self._is_proxy(client)
        if is_proxy or not self._keys:
            tenant = headers.get(b"x-kairos-tenant")
            if tenant and _TENANT.fullmatch(tenant):
                return Identity(tenant.decode(), self._anyone.classes)
            if is_proxy:
                return Identity(identity.tenant, self._anyone.classes)
        return identity

    def set_targets(self, call: Call, identity: Identity, headers: Headers) -> None:
        """The tenant, class and targets of a request; headers may ask for looser targets than the class's.

        Raises:
            CallError: a class that there is not or that it may not choose, a target that is no number.
        """
        call.tenant = identity.tenant
        name = headers.get(b"x-kairos-class", b"").decode("latin-1") or identity.classes[0]
        if name not in self._classes:
            raise CallError(400, "unknown_class", "x-kairos-class names no SLO class")
        if name not in identity.classes:
            raise CallError(403, "class_not_allowed", "the key may not use this SLO class")
        promise = self._classes[name]
        call.slo_class = name
        call.ttft_target_s = NO_TARGET_S if promise.ttft_s is None else promise.ttft_s
        call.tpot_target_s = NO_TARGET_S if promise.tpot_s is None else promise.tpot_s
        if not _ASKS_FOR_TARGETS.isdisjoint(headers):
            call.ttft_target_s = _target(headers, _TTFT_HEADERS, call.ttft_target_s)
            call.tpot_target_s = _target(headers, _TPOT_HEADERS, call.tpot_target_s)

    def _is_proxy(self, client: str) -> bool:
        if not self._proxies:
            return False
        try:
            address = ipaddress.ip_address(client)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


def request_id_of(headers: Headers) -> str:
    """The id that the client gave, or a new one."""
    given = headers.get(b"x-request-id")
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def trace_lines(headers: Headers) -> bytes:
    """W3C trace context as headers for the engines: the same trace, a new span."""
    given = headers.get(b"traceparent")
    if given is None or (match := _TRACEPARENT.fullmatch(given)) is None:
        return b""
    parent = b"traceparent: 00-%b-%b-%b\r\n" % (match[1], os.urandom(8).hex().encode(), match[2])
    state = headers.get(b"tracestate", b"")
    return parent + (b"tracestate: %b\r\n" % state if _TRACESTATE.fullmatch(state) else b"")


def _target(headers: Headers, names: tuple[tuple[bytes, float], ...], promised_s: float) -> float:
    for name, unit_s in names:
        if (raw := headers.get(name)) is not None:
            try:
                asked_s = float(raw) * unit_s
            except ValueError:
                asked_s = math.nan
            if not 0 < asked_s < math.inf:
                raise CallError(400, "invalid_target", f"{name.decode()} must be a number above 0")
            return asked_s if promised_s == NO_TARGET_S else max(asked_s, promised_s)
    return promised_s


def _digest(key: bytes) -> bytes:
    """Keys are looked up by their hash, so that the time it takes tells nothing of them."""
    return hashlib.sha256(key).digest()
