"""The prefill rule of the paper, as published: a baseline."""

import heapq
from collections.abc import Sequence

import msgspec

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillPlan, PrefillStep, PrefillView
from kairos.scheduler_core.slo import NO_TARGET_S

_FIRST_STEP_TOKENS = 4096
"""Prompt length at which the profile's prior stands in for the mean rate before the first step."""


class MeanRate(msgspec.Struct):
    """Running totals of an instance's prefill steps."""

    tokens: int = 0
    busy_s: float = 0.0


class KairosPaper:
    """Highest normalised urgency first, filling the step to its token budget.

    Finish times are predicted in arrival order with the mean rate mu = all tokens / all busy seconds so far; urgency =
    (target - (finish - arrival)) / target / prompt tokens. There is no lost class and no starvation rule. Two known
    flaws are kept: a short late arrival is called lost because arrival order would lose it, and dividing a negative
    slack by the length puts long lost requests before short ones.

    Source: Wang and Yang 2026, arXiv 2605.02329v1, Algorithms 1 and 2.
    """

    def __init__(self) -> None:
        self.state = MeanRate()

    def plan(self, view: PrefillView) -> PrefillPlan:
        """Waiting ids by urgency; as many share the step as its token budget and the instance take."""
        seconds_per_token = 1 / self._tokens_per_s(view)
        finish_s = view.now_s  # never before an arrival: whoever waits has arrived
        ranked: list[tuple[float, RequestId, int]] = []
        for w in view.waiting:
            target_s = w.ttft_target_s
            remaining_tokens = w.prompt_tokens - w.cached_tokens - w.prefilled_tokens
            finish_s += remaining_tokens * seconds_per_token
            slack_share = (target_s - (finish_s - w.arrival_s)) / target_s if target_s < NO_TARGET_S else 1.0
            urgency = slack_share / w.prompt_tokens
            ranked.append((-urgency, w.request_id, remaining_tokens))
        first = heapq.nsmallest(max(view.wanted, view.instance.max_requests_per_step), ranked)
        return PrefillPlan([request_id for _, request_id, _ in first], self._together(first, view))

    def observe(self, step: PrefillStep) -> None:
        """Take a step into the running mean."""
        self.state.tokens += step.new_tokens
        self.state.busy_s += step.seconds

    def _tokens_per_s(self, view: PrefillView) -> float:
        if self.state.busy_s > 0:
            return self.state.tokens / self.state.busy_s
        return _FIRST_STEP_TOKENS / view.instance.step_times.remaining_prefill_s(
            _FIRST_STEP_TOKENS, 0, view.instance.chunk_tokens
        )

    def _together(self, ranked: Sequence[tuple[float, RequestId, int]], view: PrefillView) -> int:
        budget = view.instance.chunk_tokens
        if budget is None:
            return 1
        together = 0
        for _, _, tokens in ranked[: view.instance.max_requests_per_step]:
            if budget <= 0:
                break
            budget -= tokens
            together += 1
        return max(together, 1)
