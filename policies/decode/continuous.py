"""Continuous batching: whoever fits joins, everyone runs."""

from kairos.scheduler_core.policy import DecodePlan, DecodeView, admit_while


class Continuous:
    """Admit in ready order up to the batch cap and the KV room; all residents take part in every step."""

    def step(self, view: DecodeView) -> DecodePlan:
        """Admit who fits; everyone takes part."""
        cap = min(view.instance.max_batch, view.instance.batch_limit)
        return DecodePlan(admit_while(view, view.ready, lambda request, batch_size, sum_context: batch_size < cap))
