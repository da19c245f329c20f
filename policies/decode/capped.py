"""Continuous batching that stops growing at the tightest target."""

from kairos.scheduler_core.domain import Resident
from kairos.scheduler_core.policy import DecodePlan, DecodeView, admit_while


class Capped:
    """As `continuous`, but admit only while the step stays within the tightest TPOT target."""

    def step(self, view: DecodeView) -> DecodePlan:
        """Admit while the step of all stays within the tightest target of residents and candidate."""
        cap = min(view.instance.max_batch, view.instance.batch_limit)
        step_s = view.instance.step_times.decode_step_s
        tightest_s = view.tightest_tpot_s
        if not view.residents and view.ready:
            tightest_s = view.ready[0].tpot_target_s  # an empty instance takes its first one untested

        def in_time(request: Resident, batch_size: int, sum_context_tokens: int) -> bool:
            nonlocal tightest_s
            tightest_s = min(tightest_s, request.tpot_target_s)
            return (
                batch_size < cap and step_s(batch_size + 1, sum_context_tokens + request.context_tokens) <= tightest_s
            )

        return DecodePlan(admit_while(view, view.ready, in_time))
