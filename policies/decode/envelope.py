"""A rate budget over mixed TPOT targets: the default."""

from collections.abc import Iterable, Sequence

import msgspec

from kairos.scheduler_core.domain import RequestId, Resident
from kairos.scheduler_core.policy import DecodePlan, DecodeView, admit_while

_OVERDUE_TARGETS = 3.0
"""A resident whose next token is later than this many targets counts as overdue."""

_KEEP_CLASS_GAIN = 1.02
"""How much more another target must yield before the kept one changes."""


class KeptTarget(msgspec.Struct):
    """The tightest TPOT target that is being kept; 0 = all of them."""

    tpot_target_s: float = 0.0


class Envelope:
    """Keep as many token envelopes as the step-time budget allows; what is lost runs in spare room.

    With T = a + b*B + c*S, a request costs e = b + c*context. A request is overdue when its next token is more than
    three targets late, or when its target can be met by no batch (a >= h*target); the others are recoverable.

    1. With P = h x the tightest recoverable target, recoverable requests may use sum e/target <= h*(1 - a/P).
    2. Admit cheapest rate first: recoverable ones while that budget and the KV room last, in exchange for the overdue
       resident with the longest context where only KV is missing; overdue ones only while the step of all is <= P.
    3. With several targets that do not all fit, keep the target that maximises the sum of 1/target that fits; tighter
       requests count as overdue for now.
    4. Everyone steps when that takes at most P; otherwise one overdue request, the recoverable ones by due time, then
       the overdue ones, each while the step stays within P. A gap of more than `longest_gap_targets` targets goes first.

    Args:
        h: share of the target that step time may use, above 0 up to 1.
        longest_gap_targets: longest gap between two tokens in targets before a request goes first, at least 1.

    Source: algorithms.md section 2.
    """

    def __init__(self, h: float = 0.9, longest_gap_targets: float = 20.0) -> None:
        if not 0 < h <= 1:
            raise ValueError(f"h is {h}; use a share above 0 up to 1")
        if longest_gap_targets < 1:
            raise ValueError(f"longest_gap_targets is {longest_gap_targets}; use 1 or more")
        self.h = h
        self.longest_gap_targets = longest_gap_targets
        self.state = KeptTarget()

    def step(self, view: DecodeView) -> DecodePlan:
        """Whom to swap out and admit, and who takes part."""
        if not view.ready:
            all_s = view.instance.step_times.decode_step_s(len(view.residents), view.sum_context_tokens)
            if all_s <= self.h * view.tightest_tpot_s:
                return DecodePlan()
        return _Step(self, view).plan()


class _Step:
    """The working of one decision."""

    def __init__(self, policy: Envelope, view: DecodeView) -> None:
        self.policy = policy
        self.view = view
        self.h = policy.h
        self.a_s, self.b_s, self.c_s = view.instance.step_times.decode_line
        self.step_s = view.instance.step_times.decode_step_s

    def cost_s(self, r: Resident) -> float:
        return self.b_s + self.c_s * r.context_tokens

    def budget(self, tightest_s: float) -> float:
        """Sum of cost/target that recoverable requests may use when the step is at most h x `tightest_s`."""
        return self.h * (1 - self.a_s / (self.h * tightest_s))

    def is_overdue(self, r: Resident) -> bool:
        late_s = self.view.now_s - r.due_s
        return late_s > _OVERDUE_TARGETS * r.tpot_target_s or self.a_s >= self.h * r.tpot_target_s

    def plan(self) -> DecodePlan:
        view = self.view
        everyone = [*view.residents, *view.ready]
        recoverable = {r.request_id for r in everyone if not self.is_overdue(r)}
        if not recoverable:
            limit = view.instance.batch_limit
            return DecodePlan(admit_while(view, view.ready, lambda request, batch_size, _: batch_size < limit))
        kept_s = self.kept_target_s([r for r in everyone if r.request_id in recoverable])
        recoverable -= {r.request_id for r in everyone if r.tpot_target_s < kept_s}
        swap_out, joined = self.admit(recoverable)
        leaving = {r.request_id for r in swap_out}
        members = [r for r in view.residents if r.request_id not in leaving] + joined
        return DecodePlan(
            [r.request_id for r in joined],
            self.participants(members, recoverable),
            [r.request_id for r in swap_out],
        )

    def kept_target_s(self, recoverable: Sequence[Resident]) -> float:
        """The target to keep: 0 (all) when everything fits, else the one whose fitting requests are worth most."""
        targets = sorted({r.tpot_target_s for r in recoverable})
        state = self.policy.state
        total = sum(self.cost_s(r) / r.tpot_target_s for r in recoverable)
        if len(targets) == 1 or total <= self.budget(targets[0]):
            state.tpot_target_s = 0.0
            return 0.0
        by_rate = sorted(recoverable, key=lambda r: self.cost_s(r) / r.tpot_target_s)
        worth = {target_s: self.worth(by_rate, target_s) for target_s in targets}
        best_s = max(targets, key=lambda target_s: worth[target_s])
        held = worth.get(state.tpot_target_s)
        if held is None or worth[best_s] > held * _KEEP_CLASS_GAIN:
            state.tpot_target_s = best_s
        return state.tpot_target_s

    def worth(self, by_rate: Iterable[Resident], target_s: float) -> float:
        """Sum of 1/target of the requests not tighter than `target_s` that fit its rate budget, cheapest first."""
        left = self.budget(target_s)
        total = 0.0
        for r in by_rate:
            if r.tpot_target_s >= target_s:
                left -= self.cost_s(r) / r.tpot_target_s
                if left < 0:
                    break
                total += 1 / r.tpot_target_s
        return total

    def admit(self, recoverable: set[RequestId]) -> tuple[list[Resident], list[Resident]]:
        """Who is swapped out and who joins."""
        view = self.view
        swap_out: list[Resident] = []
        joined: list[Resident] = []
        if not view.ready:
            return swap_out, joined
        used = sum(self.cost_s(r) / r.tpot_target_s for r in view.residents if r.request_id in recoverable)
        tightest_s = min(
            (r.tpot_target_s for r in view.residents if r.request_id in recoverable), default=float("inf")
        )
        spare = sorted(
            (r for r in view.residents if r.request_id not in recoverable), key=lambda r: r.context_tokens
        )
        batch_size, sum_context = len(view.residents), view.sum_context_tokens
        for r in sorted(
            view.ready, key=lambda r: (r.request_id not in recoverable, self.cost_s(r) / r.tpot_target_s)
        ):
            if batch_size >= view.instance.batch_limit:
                break
            rate = self.cost_s(r) / r.tpot_target_s
            if r.request_id in recoverable:
                limit_s = min(tightest_s, r.tpot_target_s)
                if batch_size and used + rate > self.budget(limit_s):
                    continue
                while spare and not view.fits(r, batch_size, sum_context):
                    leaving = spare.pop()
                    swap_out.append(leaving)
                    batch_size -= 1
                    sum_context -= leaving.context_tokens
                if not view.fits(r, batch_size, sum_context):
                    break
                used += rate
                tightest_s = limit_s
            elif batch_size and not (
                view.fits(r, batch_size, sum_context)
                and self.step_s(batch_size + 1, sum_context + r.context_tokens) <= self.h * tightest_s
            ):
                break
            joined.append(r)
            batch_size += 1
            sum_context += r.context_tokens
        return swap_out, joined

    def participants(self, members: Sequence[Resident], recoverable: set[RequestId]) -> list[RequestId] | None:
        """Who takes part; None = everyone."""
        in_time = [r for r in members if r.request_id in recoverable]
        if not in_time:
            return None
        limit_s = self.h * min(r.tpot_target_s for r in in_time)
        if self.step_s(len(members), sum(r.context_tokens for r in members)) <= limit_s:
            return None
        now_s = self.view.now_s

        def urgency(r: Resident) -> tuple[bool, float]:
            gap_s = now_s - r.last_token_s
            return gap_s <= self.policy.longest_gap_targets * r.tpot_target_s, r.due_s

        overdue = sorted((r for r in members if r.request_id not in recoverable), key=lambda r: r.due_s)
        queue = [*overdue[:1], *sorted(in_time, key=urgency), *overdue[1:]]
        chosen: list[RequestId] = []
        sum_context = 0
        for r in queue:
            if chosen and self.step_s(len(chosen) + 1, sum_context + r.context_tokens) > limit_s:
                continue
            chosen.append(r.request_id)
            sum_context += r.context_tokens
        return chosen
