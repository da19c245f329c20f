"""A decode instance of the simulator."""

from collections.abc import Sequence

from kairos.adapters.simulator.fleet import DecodeUnit
from kairos.adapters.simulator.noise import PredictedStepTimes, StepNoise
from kairos.adapters.simulator.outcome import FINISHED, Outcome
from kairos.adapters.simulator.prefill import PrefillRun
from kairos.scheduler_core import slo
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import DecodeInstance, Resident, StepTimes
from kairos.scheduler_core.policy import DecodeLoad, DecodePlan, DecodeStep, DecodeView, Observer


class DecodeRun:
    """One decode instance at work. Residents are updated in place; sums are kept, not recomputed."""

    def __init__(
        self,
        index: int,
        instance: DecodeInstance,
        real_times: StepTimes,
        unit: DecodeUnit,
        decider: Decider,
        noise: StepNoise,
        outcome: Outcome,
        told: PredictedStepTimes | None,
    ) -> None:
        self.index = index
        self.instance = instance
        self.unit = unit
        self.residents: list[Resident] = []
        self.ready: list[Resident] = []
        self.busy = False
        self.started_s = 0.0
        self.members: Sequence[Resident] = ()
        self.member_context = 0
        """Context tokens of the members before their step."""
        self.holders: dict[int, PrefillRun] = {}
        """Prefill instances that hold the KV of requests not admitted yet."""
        self._step_s = real_times.decode_step_s
        self._times = real_times
        self.use(decider)
        self._noise = noise
        self._outcome = outcome
        self._told = told
        self._sum_context = 0
        self._tightest_s = slo.NO_TARGET_S
        self._expected: dict[int, int] = {}
        self._recompute: dict[object, int] = {}
        """Context tokens to compute again for requests that were swapped out, where that is not free."""

    def use(self, decider: Decider) -> None:
        """Let a strategy decide here from the next step on."""
        self._decider = decider
        self._policy = decider.decode_policy(self.instance)
        self._observes = isinstance(self._policy, Observer)

    # -- load

    def load(self) -> DecodeLoad:
        """Its load, for placement."""
        tightest_s = min((r.tpot_target_s for r in self.ready), default=slo.NO_TARGET_S)
        return DecodeLoad(
            self.instance,
            len(self.residents),
            self._sum_context,
            len(self.ready) + len(self._expected),
            sum(r.context_tokens for r in self.ready) + sum(self._expected.values()),
            min(tightest_s, self._tightest_s),
        )

    def expect(self, row: int, prompt_tokens: int) -> None:
        """Count a request that was placed here before its KV is there."""
        self._expected[row] = prompt_tokens

    def arrived(self, row: int) -> None:
        """The KV of an expected request is there."""
        self._expected.pop(row, None)

    def make_ready(self, resident: Resident) -> None:
        """Let a request wait for admission."""
        self.ready.append(resident)

    # -- a step

    def decide(self, now_s: float) -> list[int]:
        """Swap out, admit, choose participants; the rows that were admitted."""
        if self._told is not None:
            self._told.redraw()
        self._make_room()
        view = DecodeView(now_s, self.instance, self.residents, self.ready, self._sum_context, self._tightest_s)
        plan = self._decider.next_decode(self._policy, view).plan
        admitted = self._carry_out(plan)
        if plan.step is None:
            self.members = self.residents
            self.member_context = self._sum_context
        else:
            chosen = set(plan.step)
            self.members = [r for r in self.residents if r.request_id in chosen]
            self.member_context = sum(r.context_tokens for r in self.members)
        return admitted

    def _make_room(self) -> None:
        """The last admitted leave while the tokens of the next step would not fit."""
        residents = self.residents
        moved = False
        while len(residents) > 1 and self._sum_context + len(residents) > self.instance.kv_tokens:
            self._leave(residents.pop())
            moved = True
        if moved:
            self._retighten()

    def _leave(self, resident: Resident) -> None:
        self._sum_context -= resident.context_tokens
        self.ready.insert(0, resident)
        if self.unit.swap_out == "recompute":
            self._recompute[resident.request_id] = resident.context_tokens

    def _carry_out(self, plan: DecodePlan) -> list[int]:
        if plan.swap_out:
            leaving = set(plan.swap_out)
            stay = [r for r in self.residents if r.request_id not in leaving]
            for r in [r for r in self.residents if r.request_id in leaving]:
                self._leave(r)
            self.residents = stay
        if plan.admit:
            by_id = {r.request_id: r for r in self.ready}
            joining = [by_id[request_id] for request_id in plan.admit]
            admitted = set(plan.admit)
            self.ready = [r for r in self.ready if r.request_id not in admitted]
            self.residents.extend(joining)
            self._sum_context += sum(r.context_tokens for r in joining)
        if plan.admit or plan.swap_out:
            self._retighten()
        return list(plan.admit)  # type: ignore[arg-type]  # rows

    def _retighten(self) -> None:
        self._tightest_s = min((r.tpot_target_s for r in self.residents), default=slo.NO_TARGET_S)

    def begin(self, now_s: float) -> float:
        """Start the step that was decided; its end."""
        self.busy = True
        self.started_s = now_s
        seconds = self._step_s(len(self.members), self.member_context) * self._noise.next()
        if self._recompute:
            for r in self.members:
                tokens = self._recompute.pop(r.request_id, 0)
                seconds += self._times.remaining_prefill_s(tokens, 0, None)
        return now_s + seconds

    def end(self, now_s: float) -> None:
        """Each member emits one token; those that are done leave."""
        self.busy = False
        members, outcome = self.members, self._outcome
        longest = max(r.context_tokens for r in members) if self._observes else 0
        outputs, longest_gap_s, in_time = outcome.output_tokens, outcome.max_itl_s, outcome.tokens_in_time
        note_gap, note_row = outcome.itl_s.append, outcome.itl_row.append
        done: list[int] = []
        first_tokens = 0
        for r in members:
            row: int = r.request_id  # type: ignore[assignment]  # rows
            emitted = r.output_tokens
            r.output_tokens = emitted + 1
            if emitted:
                r.context_tokens += 1
                gap_s = now_s - r.last_token_s
                note_gap(gap_s)
                note_row(row)
                if not gap_s <= longest_gap_s[row]:
                    longest_gap_s[row] = gap_s
                if now_s <= r.due_s:
                    in_time[row] += 1
            else:  # the context of a ready request counts its first token already
                first_tokens += 1
                r.first_token_s = outcome.first_token_s[row] = now_s
            r.last_token_s = now_s
            r.due_s = r.first_token_s + (emitted + 1) * r.tpot_target_s
            if emitted + 1 >= outputs[row]:
                outcome.last_token_s[row] = now_s
                outcome.status[row] = FINISHED
                done.append(emitted + 1)
        self._sum_context += len(members) - first_tokens
        if done:
            stay = []
            for r in self.residents:
                if r.output_tokens >= outputs[r.request_id]:  # type: ignore[index]  # rows
                    self._sum_context -= r.context_tokens
                else:
                    stay.append(r)
            self.residents = stay
            self._retighten()
        if self._observes:
            step = DecodeStep(now_s - self.started_s, len(members), self.member_context, longest, done)
            self._decider.decode_ended(self._policy, step)
