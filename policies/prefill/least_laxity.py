"""Least laxity first."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class LeastLaxity:
    """Smallest deadline - now - predicted remaining prefill seconds first.

    It always works on the request with the least margin, so under overload it serves who is about to be lost.
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by laxity."""
        now_s = view.now_s
        return first_by(view, view.waiting, lambda w: w.deadline_s - now_s - w.prefill_s)
