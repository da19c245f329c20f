"""The decode rule of the paper, as published: a baseline."""

import msgspec

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import DecodePlan, DecodeStep, DecodeView, admit_while

_LENGTH_BIN_TOKENS = 256
"""Sequence lengths within one bin share a cell of the table."""


class LookUpTable(msgspec.Struct):
    """Mean observed step seconds by `batch:length bin`, with the number of steps behind each."""

    mean_s: dict[str, float] = {}
    steps: dict[str, int] = {}
    previous_per_s: float = 0.0
    """Participants per second of the step before."""


class KairosPaper:
    """Shortest contexts first, while the looked-up step time stays within the smallest slack and throughput grows.

    s_r = target x (k_r + 1) - (now - first token) - LUT[1, x_r]; s_min is the smallest. Residents are walked by
    context: r joins while LUT[B + 1, x_r] <= s_min and (B + 1) / LUT exceeds B / (the previous one); an empty set means
    that all run. Cells are means of observed steps by (batch size, longest sequence); an empty one takes the profile's
    step time. It never admits by itself: ready requests join in order up to the batch cap. One resident with negative
    slack switches it off for all: a known flaw that is kept.

    Source: Wang and Yang 2026, arXiv 2605.02329v1, Algorithm 3.
    """

    def __init__(self) -> None:
        self.state = LookUpTable()

    def step(self, view: DecodeView) -> DecodePlan:
        """Admit as `continuous`; take part by the paper's walk."""
        cap = min(view.instance.max_batch, view.instance.batch_limit)
        admit = admit_while(view, view.ready, lambda request, batch_size, sum_context: batch_size < cap)
        joining = set(admit)
        residents = [*view.residents, *(r for r in view.ready if r.request_id in joining)]
        slack_s = min(
            r.due_s - view.now_s - self._step_s(view, 1, r.context_tokens, r.context_tokens) for r in residents
        )
        members: list[RequestId] = []
        sum_context = 0
        per_s = 0.0
        for r in sorted(residents, key=lambda r: (r.context_tokens, r.request_id)):
            step_s = self._step_s(view, len(members) + 1, r.context_tokens, sum_context + r.context_tokens)
            if step_s > slack_s or (len(members) + 1) / step_s <= per_s:
                continue
            per_s = (len(members) + 1) / step_s
            members.append(r.request_id)
            sum_context += r.context_tokens
        return DecodePlan(admit, members or None)

    def observe(self, step: DecodeStep) -> None:
        """Take a step into its cell."""
        cell = _cell(step.batch_size, step.longest_context_tokens)
        seen = self.state.steps.get(cell, 0)
        mean_s = self.state.mean_s.get(cell, 0.0)
        self.state.mean_s[cell] = mean_s + (step.seconds - mean_s) / (seen + 1)
        self.state.steps[cell] = seen + 1

    def _step_s(self, view: DecodeView, batch_size: int, longest: int, sum_context: int) -> float:
        seen_s = self.state.mean_s.get(_cell(batch_size, longest))
        return seen_s if seen_s is not None else view.instance.step_times.decode_step_s(batch_size, sum_context)


def _cell(batch_size: int, longest_context_tokens: int) -> str:
    return f"{batch_size}:{longest_context_tokens // _LENGTH_BIN_TOKENS}"
