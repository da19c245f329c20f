"""KV that a NIXL prefill engine holds for one decode request: used once, and not after its time.

vLLM answers a second or a late use with 200 and possibly wrong tokens, so the gateway must not let it happen. The time
is renewed only while the decode engine steps.
"""

import msgspec

from kairos.adapters.gateway.errors import CallError


class KvGrant:
    """What a prefill engine answered for its decode engine.

    Args:
        params: its `kv_transfer_params`, opaque.
        lease_s: how long the KV is held from now on.
    """

    def __init__(self, params: msgspec.Raw, lease_s: float, now_s: float) -> None:
        self._params: msgspec.Raw | None = params
        self._lease_s = lease_s
        self.expires_s = now_s + lease_s

    def take(self, now_s: float) -> msgspec.Raw:
        """The parameters, once.

        Raises:
            CallError: they were used, or the time is over.
        """
        params, self._params = self._params, None
        if params is None:
            raise CallError(502, "kv_used", "the KV of this prompt was handed over before")
        if self.expired(now_s):
            raise expired_error()
        return params

    def renew(self, stepped_s: float) -> None:
        """The decode engine stepped at that time: two thirds of the lease from then on, unless it was over."""
        if stepped_s <= self.expires_s:
            self.expires_s = max(self.expires_s, stepped_s + self._lease_s * 2 / 3)

    def expired(self, now_s: float) -> bool:
        """Whether the KV may be gone."""
        return now_s > self.expires_s


def expired_error() -> CallError:
    """That the KV was not taken in time."""
    return CallError(504, "kv_expired", "the decode engine did not take the KV in time", may_retry=True)
