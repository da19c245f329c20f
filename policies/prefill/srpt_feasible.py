"""Shortest remaining work among those that can still be on time."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by
from kairos.scheduler_core.slo import is_lost


class SrptFeasible:
    """Smallest remaining work first among requests that can still be on time; lost ones after them, oldest first."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by remaining work, lost ones last."""
        now_s = view.now_s
        feasible = [w for w in view.waiting if not is_lost(now_s, w.prefill_s, w.deadline_s)]
        ids = list(first_by(view, feasible, lambda w: w.prefill_s))
        if len(ids) < view.wanted:
            ids += [w.request_id for w in view.waiting if is_lost(now_s, w.prefill_s, w.deadline_s)]
        return ids
