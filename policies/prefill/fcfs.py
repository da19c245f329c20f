"""First come, first served."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView


class Fcfs:
    """Oldest arrival first: what engines do by default.

    Under one fixed target it is the same rule as `edf`.
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids in arrival order."""
        return [w.request_id for w in view.waiting[: view.wanted]]
