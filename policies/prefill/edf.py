"""Earliest deadline first."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class Edf:
    """Smallest deadline (arrival + TTFT target) first."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by deadline."""
        return first_by(view, view.waiting, lambda w: w.deadline_s)
