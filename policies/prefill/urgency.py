"""Urgency: predicted TTFT over target, highest first while it can still be met."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId, Waiting
from kairos.scheduler_core.policy import PrefillView, first_by


class Urgency:
    """Most urgent first among requests still in time; lost ones after them, oldest first.

    Urgency = predicted TTFT if it ran now / TTFT target; above 1 the request is lost, whatever runs next. With equal
    targets this is least laxity: good while everything fits, poor under overload.

    Source: our reading of the summary of Wang and Yang 2026, arXiv 2605.02329.
    """

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by urgency."""
        now_s = view.now_s

        def rank(w: Waiting) -> tuple[bool, float]:
            urgency = (now_s + w.prefill_s - w.arrival_s) / w.ttft_target_s
            lost = urgency > 1.0
            return lost, w.arrival_s if lost else -urgency

        return first_by(view, view.waiting, rank)
