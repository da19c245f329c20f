"""A rate budget over mixed TPOT targets: the default."""

from collections.abc import Sequence, Set
from math import log2
from operator import attrgetter, itemgetter

import msgspec

from kairos.scheduler_core.domain import RequestId, Resident
from kairos.scheduler_core.policy import DecodePlan, DecodeStep, DecodeView, admit_while

_CHANCE = 0.5
"""A request is given up when, of those that got as far, less than this share lasts long enough to catch up."""
_STAY = 0.7
"""A resident ranks as if it cost this much of what it does: keeping it is worth more than starting another."""
_CHANGE_CLASS_GAIN = 1.02
"""How much more another tightest target must keep before it replaces the current one."""
_NEWEST = 512
"""Ready requests that are looked at, newest first: older ones are late beyond catching up."""

_BUCKETS = 40
_BUCKETS_PER_DOUBLING = 2.5
_MEMORY = 0.998
"""What remains of the weights when another request ends: they speak of the last 500."""

_due = attrgetter("due_s")
_context = attrgetter("context_tokens")


class Memory(msgspec.Struct):
    """The tightest TPOT target that is kept, and how long outputs have been."""

    tpot_target_s: float = 0.0
    ended: list[float] = msgspec.field(default_factory=lambda: [0.2] * _BUCKETS)
    """Weight of recent outputs by length, in buckets of equal width in log2."""


class Envelope:
    """Keep as many requests on time as the step-time budget allows; the others run in spare room.

    With T = a + b*B + c*S a request costs e = b + c*context a step, and needs e/target of each second. When the
    tightest kept target is tau, steps may take P = h*tau, which leaves h - a/tau for the kept ones.

    1. A request can be kept if it is on time, or likely to last long enough to catch up at step time P, by the lengths
       of recent outputs. A target with a >= h*target can be met by no batch.
    2. For each possible tau: keep requests with targets of at least tau, the cheapest e/target first, residents at a
       discount, until the budget is used. The tau that keeps most is taken, with some hysteresis.
    3. Kept ones are admitted, in exchange for the longest residents that are not kept where KV is short; the others
       while the step of all stays within P.
    4. Everyone steps when that takes at most P; otherwise the kept ones by due time, then the others, each while the
       step stays within P. So relaxed targets join every n-th step; a gap beyond `longest_gap_targets` goes first.

    Args:
        h: share of the tightest target that step time may use, above 0 up to 1.
        longest_gap_targets: gap between two tokens, in targets, after which a kept request goes first; at least 1.

    Source: our own; what was tried is in docs/experiments.md.
    """

    def __init__(self, h: float = 0.9, longest_gap_targets: float = 20.0) -> None:
        if not 0 < h <= 1:
            raise ValueError(f"h is {h}; use a share above 0 up to 1")
        if not longest_gap_targets >= 1:
            raise ValueError(f"longest_gap_targets is {longest_gap_targets}; use 1 or more")
        self.h = h
        self.longest_gap_targets = longest_gap_targets
        self.state = Memory()

    def step(self, view: DecodeView) -> DecodePlan:
        """Whom to swap out and admit, and who takes part."""
        if not view.ready:
            all_s = view.instance.step_times.decode_step_s(len(view.residents), view.sum_context_tokens)
            if all_s <= self.h * view.tightest_tpot_s:
                return DecodePlan()
        return _Step(self, view).plan()

    def observe(self, step: DecodeStep) -> None:
        """Learn how long outputs are."""
        for tokens in step.finished_output_tokens:
            self.state.ended = [weight * _MEMORY for weight in self.state.ended]
            self.state.ended[_bucket(tokens)] += 1.0


def _bucket(tokens: float) -> int:
    return min(int(_BUCKETS_PER_DOUBLING * log2(tokens)), _BUCKETS - 1) if tokens > 1 else 0


class _Step:
    """The working of one decision."""

    def __init__(self, policy: Envelope, view: DecodeView) -> None:
        self.policy = policy
        self.view = view
        self.a_s, self.b_s, self.c_s = view.instance.step_times.decode_line
        self.step_s = view.instance.step_times.decode_step_s
        self.reached: list[float] = []
        """Weight of outputs that reached each bucket."""
        total = 0.0
        for weight in reversed(policy.state.ended):
            total += weight
            self.reached.append(total)
        self.reached.reverse()

    def plan(self) -> DecodePlan:
        view, h = self.view, self.policy.h
        targets = {r.tpot_target_s for r in view.residents}
        targets.update(r.tpot_target_s for r in view.ready[-_NEWEST:])
        possible = sorted(t for t in targets if self.a_s < h * t)
        if not possible:
            limit = view.instance.batch_limit
            return DecodePlan(admit_while(view, view.ready, lambda request, batch_size, _: batch_size < limit))
        kept = self.keep_most(possible)
        limit_s = h * min((r.tpot_target_s for r in kept), default=possible[-1])
        kept_ids = {r.request_id for r in kept}
        swapped_out, joined = self.admit(kept_ids, limit_s)
        leaving = {r.request_id for r in swapped_out}
        members = [r for r in view.residents if r.request_id not in leaving] + joined
        return DecodePlan(
            [r.request_id for r in joined],
            self.participants(members, kept_ids, limit_s),
            [r.request_id for r in swapped_out],
        )

    def keep_most(self, possible: Sequence[float]) -> list[Resident]:
        """The requests to keep on time, under the tightest target that keeps most of them."""
        b_s, c_s = self.b_s, self.c_s
        ranked = [(_STAY * (b_s + c_s * r.context_tokens) / r.tpot_target_s, r) for r in self.view.residents]
        ranked += [((b_s + c_s * r.context_tokens) / r.tpot_target_s, r) for r in self.view.ready[-_NEWEST:]]
        ranked.sort(key=itemgetter(0))
        by_cost = [r for _, r in ranked]
        if len(possible) == 1:
            return self.fill(by_cost, possible[0])
        state = self.policy.state
        kept = {target_s: self.fill(by_cost, target_s) for target_s in possible}
        best_s = max(possible, key=lambda target_s: len(kept[target_s]))
        current = kept.get(state.tpot_target_s)
        if current is None or len(kept[best_s]) > len(current) * _CHANGE_CLASS_GAIN:
            state.tpot_target_s = best_s
        return kept[state.tpot_target_s]

    def fill(self, by_cost: Sequence[Resident], tightest_s: float) -> list[Resident]:
        """As many as the budget holds when `tightest_s` is the tightest target kept, the cheapest first."""
        h, b_s, c_s, reached = self.policy.h, self.b_s, self.c_s, self.reached
        now_s, step_s = self.view.now_s, h * tightest_s
        budget = h - self.a_s / tightest_s
        kept: list[Resident] = []
        for r in by_cost:
            target_s = r.tpot_target_s
            if target_s < tightest_s:
                continue
            late_s = now_s - r.due_s
            if late_s > 0 and (
                target_s <= step_s  # h = 1: no step gains time
                or reached[_bucket(r.output_tokens + late_s / (target_s - step_s))]
                < _CHANCE * reached[_bucket(r.output_tokens + 1)]
            ):
                continue
            budget -= (b_s + c_s * r.context_tokens) / target_s
            if budget < 0 and kept:
                break
            kept.append(r)
        return kept

    def admit(self, kept_ids: Set[RequestId], limit_s: float) -> tuple[list[Resident], list[Resident]]:
        """Who is swapped out and who joins."""
        view, limit = self.view, self.view.instance.batch_limit
        swapped_out: list[Resident] = []
        joined: list[Resident] = []
        batch_size, sum_context = len(view.residents), view.sum_context_tokens
        spare = sorted((r for r in view.residents if r.request_id not in kept_ids), key=_context)
        for r in view.ready:
            if r.request_id not in kept_ids:
                continue
            while spare and (batch_size >= limit or not view.fits(r, batch_size, sum_context)):
                leaving = spare.pop()
                swapped_out.append(leaving)
                batch_size -= 1
                sum_context -= leaving.context_tokens
            if batch_size >= limit or not view.fits(r, batch_size, sum_context):
                break
            joined.append(r)
            batch_size += 1
            sum_context += r.context_tokens
        if swapped_out or (batch_size and self.step_s(batch_size + 1, sum_context) > limit_s):
            return swapped_out, joined
        for r in sorted((r for r in view.ready if r.request_id not in kept_ids), key=_context):
            late = self.step_s(batch_size + 1, sum_context + r.context_tokens) > limit_s
            if batch_size and (late or batch_size >= limit or not view.fits(r, batch_size, sum_context)):
                break
            joined.append(r)
            batch_size += 1
            sum_context += r.context_tokens
        return swapped_out, joined

    def participants(
        self, members: Sequence[Resident], kept_ids: Set[RequestId], limit_s: float
    ) -> list[RequestId] | None:
        """Who takes part; None = everyone."""
        if self.step_s(len(members), sum(map(_context, members))) <= limit_s:
            return None
        now_s, longest_gap = self.view.now_s, self.policy.longest_gap_targets

        def urgency(r: Resident) -> tuple[bool, float]:
            return now_s - r.last_token_s <= longest_gap * r.tpot_target_s, r.due_s

        queue = sorted((r for r in members if r.request_id in kept_ids), key=urgency)
        queue += sorted((r for r in members if r.request_id not in kept_ids), key=_due)
        chosen: list[RequestId] = []
        sum_context = 0
        for r in queue:
            if not chosen or self.step_s(len(chosen) + 1, sum_context + r.context_tokens) <= limit_s:
                chosen.append(r.request_id)
                sum_context += r.context_tokens
        return chosen
