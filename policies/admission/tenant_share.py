"""A share of prefill time for each tenant."""

import math
from collections.abc import Mapping

import msgspec

from kairos.scheduler_core.policy import Admission, AdmissionView


class Buckets(msgspec.Struct):
    """Predicted prefill seconds each tenant may still use, as of `now_s`."""

    now_s: float = 0.0
    left_s: dict[str, float] = {}


class TenantShare:
    """A weighted token bucket of predicted prefill seconds per tenant.

    Refuse (429) only when the tenant is over its share and others wait: an idle fleet refuses nobody.

    Args:
        shares: seconds of prefill per second that each tenant may use, by tenant; others get `default_share`.
        window_s: how many seconds of its share a tenant may save up, above 0.
        default_share: share of a tenant that is not named.
    """

    needs_prediction = False

    def __init__(
        self, shares: Mapping[str, float] | None = None, window_s: float = 60.0, default_share: float = 0.1
    ) -> None:
        if not window_s > 0:
            raise ValueError(f"window_s is {window_s}; use seconds above 0")
        self.shares = dict(shares or {})
        if bad := {t: s for t, s in {**self.shares, "default_share": default_share}.items() if not s > 0}:
            raise ValueError(f"shares must be above 0, not {bad}")
        self.window_s = window_s
        self.default_share = default_share
        self.state = Buckets()

    def admit(self, view: AdmissionView) -> Admission:
        """Accepted and charged, or refused until the bucket covers the request."""
        tenant, cost_s = view.request.tenant, view.request.total_prefill_s
        share = self.shares.get(tenant, self.default_share)
        self._refill(view.now_s)
        left_s = self.state.left_s.setdefault(tenant, share * self.window_s)
        needed_s = min(cost_s, share * self.window_s)  # a full bucket takes any request, or the longest never ran
        if left_s < needed_s and view.others_waiting:
            retry_after_s = min(60, max(1, math.ceil((needed_s - left_s) / share)))
            return Admission(accept=False, status=429, reason="over_tenant_share", retry_after_s=retry_after_s)
        self.state.left_s[tenant] = left_s - cost_s
        return Admission(accept=True)

    def _refill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self.state.now_s)
        self.state.now_s = now_s
        for tenant, left_s in self.state.left_s.items():
            share = self.shares.get(tenant, self.default_share)
            self.state.left_s[tenant] = min(left_s + share * elapsed_s, share * self.window_s)
