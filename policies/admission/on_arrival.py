"""Refuse what is lost on arrival."""

import math

from kairos.scheduler_core.policy import Admission, AdmissionView


class OnArrival:
    """Refuse (503) when even the lower-quantile predicted TTFT, queue included, exceeds patience x target.

    Retry-After is the predicted time until the queue has drained so far that the target could be met.

    Args:
        patience: how many targets a request may be late by prediction, above 0.
    """

    needs_prediction = True

    def __init__(self, patience: float = 1.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience is {patience}; use a number above 0")
        self.patience = patience

    def admit(self, view: AdmissionView) -> Admission:
        """Accepted, or refused as lost on arrival."""
        limit_s = self.patience * view.request.ttft_target_s
        if view.predicted_ttft_s <= limit_s:
            return Admission(accept=True)
        retry_after_s = min(60, max(1, math.ceil(view.predicted_ttft_s - limit_s)))
        return Admission(accept=False, status=503, reason="lost_on_arrival", retry_after_s=retry_after_s)
