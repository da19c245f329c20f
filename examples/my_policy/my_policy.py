"""A prefill policy in a package of its own; docs/write-a-policy.md tells its story."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId, Waiting
from kairos.scheduler_core.policy import PrefillView, first_by
from kairos.scheduler_core.slo import is_lost


class RescueShort:
    """Requests that are about to be lost first, the shortest of them before the others; the rest by deadline.

    Lost ones come last, oldest first.

    Args:
        soon_s: with less than so many seconds of margin, a request is about to be lost.
    """

    def __init__(self, soon_s: float = 1.0) -> None:
        if soon_s < 0:
            raise ValueError(f"soon_s is {soon_s}; use 0 or more")
        self.soon_s = soon_s

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by group, then by work, deadline or arrival."""

        def rank(w: Waiting) -> tuple[int, float]:
            if is_lost(view.now_s, w.prefill_s, w.deadline_s):
                return 2, w.arrival_s
            if w.deadline_s - view.now_s - w.prefill_s < self.soon_s:
                return 0, w.prefill_s
            return 1, w.deadline_s

        return first_by(view, view.waiting, rank)
