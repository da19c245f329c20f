"""Slack-guided batching: admit by room, shrink the step to what the tightest target allows."""

from operator import attrgetter

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import DecodePlan, DecodeView, admit_while

_context = attrgetter("context_tokens")


class Slack:
    """Admit by KV room, shortest context first; when the step of all is too long, let only the shortest take part.

    The step takes residents by context (ties: id) while it stays within `h` x the tightest target among the residents,
    at least the shortest; the first that does not fit ends the walk. So the batch grows when there is slack and
    shrinks when it is gone.

    Args:
        h: share of the tightest target that step time may use, above 0.

    Source: our reading of the summary of Wang and Yang 2026, arXiv 2605.02329.
    """

    def __init__(self, h: float = 1.0) -> None:
        if not h > 0:
            raise ValueError(f"h is {h}; use a share above 0")
        self.h = h

    def step(self, view: DecodeView) -> DecodePlan:
        """Admit who fits, shortest first; take part while in time, shortest first."""
        instance = view.instance
        shortest = min(view.ready, key=_context, default=None)
        full = shortest is None or not view.fits(shortest, len(view.residents), view.sum_context_tokens)
        ready = [] if full else sorted(view.ready, key=_context)
        admit = admit_while(view, ready, lambda request, batch_size, sum_context: batch_size < instance.batch_limit)
        joined = ready[: len(admit)]
        batch_size = len(view.residents) + len(joined)
        sum_context = view.sum_context_tokens + sum(r.context_tokens for r in joined)
        tightest_s = min([view.tightest_tpot_s, *(r.tpot_target_s for r in joined)])
        budget_s = self.h * tightest_s
        step_s = instance.step_times.decode_step_s
        if step_s(batch_size, sum_context) <= budget_s:
            return DecodePlan(admit)
        members: list[RequestId] = []
        taken_context = 0
        for r in sorted([*view.residents, *joined], key=lambda r: (r.context_tokens, r.request_id)):
            if members and step_s(len(members) + 1, taken_context + r.context_tokens) > budget_s:
                break
            members.append(r.request_id)
            taken_context += r.context_tokens
        return DecodePlan(admit, members)
