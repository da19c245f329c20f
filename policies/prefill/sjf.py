"""Shortest job first."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class Sjf:
    """Smallest predicted remaining prefill seconds first.

    Good for the many short prompts, at the price of the long ones, which starve under overload.
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by remaining work."""
        return first_by(view, view.waiting, lambda w: w.prefill_s)
