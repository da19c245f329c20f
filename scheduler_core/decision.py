"""What was decided and why: codes and numbers that "why did this request wait?" is answered from."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from kairos.scheduler_core.domain import Part, RequestId, Waiting
from kairos.scheduler_core.policy import DecodePlan
from kairos.scheduler_core.slo import is_lost


class Reason(StrEnum):
    """Why a decision came out as it did."""

    POLICY = "policy"
    """the policy's order"""
    CONTINUES = "continues"
    """an unfinished prompt goes on: the rule does not preempt"""
    LOST_LAST = "lost_last"
    """only lost requests wait; the oldest of them"""
    SHARE_GUARD = "share_guard"
    """the share of lost and deferred requests covers this one"""
    FALLBACK = "fallback"
    """arrival order, in place of a policy that failed"""
    NOT_CONTROLLED = "not_controlled"
    """the engine decides this; Kairos cannot"""


class PrefillDecision(msgspec.Struct, frozen=True, gc=False):
    """The next step of a prefill instance: requests in order, and how many tokens of each."""

    requests: Sequence[Waiting]
    parts: Sequence[Part]
    reason: Reason

    @property
    def request_ids(self) -> list[RequestId]:
        """Who takes part."""
        return [request.request_id for request in self.requests]


class DecodeDecision(msgspec.Struct, frozen=True, gc=False):
    """What a decode instance does next."""

    plan: DecodePlan
    reason: Reason


class Standing(StrEnum):
    """How a waiting request stands at a decision."""

    RUNS_NEXT = "runs_next"
    BEHIND = "waits_behind_more_urgent_work"
    LOST = "lost"


class Explanation(msgspec.Struct, frozen=True, gc=False):
    """Where one waiting request stands in the order, in numbers."""

    code: Standing
    waited_s: float
    laxity_s: float
    """Deadline - now - predicted remaining prefill seconds; negative = lost."""
    ahead_requests: int
    ahead_s: float
    """Predicted seconds of the work that runs before it."""


def explain(request: Waiting, now_s: float, place: int, ahead_s: float, runs_next: bool) -> Explanation:
    """Say how a request at `place` (0 = first) of the order stands."""
    if runs_next:
        code = Standing.RUNS_NEXT
    elif is_lost(now_s, request.prefill_s, request.deadline_s):
        code = Standing.LOST
    else:
        code = Standing.BEHIND
    return Explanation(code, now_s - request.arrival_s, request.deadline_s - now_s - request.prefill_s, place, ahead_s)
