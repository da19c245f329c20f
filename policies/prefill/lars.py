"""Least relative slack first."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class Lars:
    """Smallest (deadline - now - remaining work) / whole work first: a long prompt may have more slack.

    Source: Medha, "length-aware relative slack" (arXiv 2409.17264).
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by relative slack."""
        now_s = view.now_s
        return first_by(view, view.waiting, lambda w: (w.deadline_s - now_s - w.prefill_s) / w.total_prefill_s)
