"""Deadlines while they fit, value density when they do not."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class DeadlineDensity:
    """Deadline order while the queue fits its deadlines; otherwise highest value per second, 1/work, first.

    The boundary moves with the load: in deadline order, the first request that would be late marks it. The requests up
    to it compete for time that is not there, so they go by density; those behind it keep their deadline order. Lost
    requests go last, oldest first.

    Source: the idea of ProServe's SlideBatching, a deadline queue and a density queue with a sliding boundary.
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by density up to the boundary, by deadline behind it."""
        busy_until_s = view.now_s
        boundary = 0
        for place, w in enumerate(view.by_deadline, start=1):
            busy_until_s += w.prefill_s
            if busy_until_s > w.deadline_s:
                boundary = place
                break
        ids = first_by(view, view.by_deadline[:boundary], lambda w: w.prefill_s)
        ids += [w.request_id for w in view.by_deadline[boundary:][: view.wanted]]
        return ids + [w.request_id for w in view.lost[: view.wanted]]
