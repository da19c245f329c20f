"""Shortest job first, with age."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class AgedSjf:
    """Highest (wait + work) / work first, so that a long wait makes up for a long prompt.

    Source: highest response ratio next (Brinch Hansen 1971).
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by response ratio."""
        now_s = view.now_s
        return first_by(view, view.waiting, lambda w: -((now_s - w.arrival_s + w.prefill_s) / w.prefill_s))
