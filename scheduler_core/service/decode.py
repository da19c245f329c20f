"""The decode half of a snapshot: placement of what has left prefill, then the next step of every decode instance.

Decisions are made as the simulator makes them, by the same Decider: placement in ready order, then swap out, admit and
choose participants for each instance in index order.
"""

from collections.abc import Callable, Sequence

from kairos.scheduler_core.decider import Decider, decode_view
from kairos.scheduler_core.decision import Reason
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, DecodeInstance, Resident, StepTimes
from kairos.scheduler_core.policy import DecodeLoad, DecodePlacementView, DecodePolicy
from kairos.scheduler_core.service.schemas import (
    DecodeAnswer,
    DecodeCode,
    DecodeReason,
    Instance,
    Placement,
    ResidentRequest,
    RunningRequest,
    TransferredRequest,
    WaitingRequest,
)
from kairos.scheduler_core.slo import NO_TARGET_S, token_deadline_s, ttft_deadline_s

Targets = Callable[[str], tuple[float, float]]
"""TTFT and TPOT targets of an SLO class; inf without one."""


class Batch:
    """One decode instance of a snapshot."""

    def __init__(self, told: Instance, serves: frozenset[str], step_times: StepTimes, decider: Decider) -> None:
        self.instance = DecodeInstance(
            told.instance_id,
            step_times,
            told.max_batch,
            told.kv_tokens or UNLIMITED_TOKENS,
            told.batch_limit or UNLIMITED_TOKENS,
            told.control,
        )
        self.serves = serves
        self.free_in_s = told.free_in_s or 0.0
        self.policy: DecodePolicy = decider.decode_policy(self.instance)
        self.residents: list[Resident] = []
        self.ready: list[Resident] = []
        # running totals: of residents, of those placed here and not admitted, of both
        self.sum_context_tokens = 0
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.tightest_s = NO_TARGET_S

    def hold(self, resident: Resident) -> None:
        """Take in a request of its batch."""
        self.residents.append(resident)
        self.sum_context_tokens += resident.context_tokens
        self.tightest_s = min(self.tightest_s, resident.tpot_target_s)

    def let_wait(self, resident: Resident) -> None:
        """Take in a request that waits for admission."""
        self.ready.append(resident)
        self.expect(resident.context_tokens)
        self.tightest_s = min(self.tightest_s, resident.tpot_target_s)

    def expect(self, tokens: int) -> None:
        """Count a request that was placed here before its KV is here."""
        self.waiting_requests += 1
        self.waiting_tokens += tokens

    def load(self) -> DecodeLoad:
        """Its load, for placement."""
        return DecodeLoad(
            self.instance,
            len(self.residents),
            self.sum_context_tokens,
            self.waiting_requests,
            self.waiting_tokens,
            self.tightest_s,
        )

    def decide(self, decider: Decider, now_s: float) -> DecodeAnswer:
        """What it does when it is free."""
        resident_requests, ready_requests = len(self.residents), len(self.ready)
        tightest_s = min((r.tpot_target_s for r in self.residents), default=NO_TARGET_S)
        swapped_out = self._make_room()
        code = DecodeCode.IDLE
        admitted: list[Resident] = []
        members: list[Resident] = []
        if self.residents or self.ready:
            view = decode_view(now_s + self.free_in_s, self.instance, self.residents, self.ready)
            decision = decider.next_decode(self.policy, view)
            code, decided = self._code(decision.reason), decision.plan
            leaving = set(decided.swap_out)
            swapped_out += [r for r in self.residents if r.request_id in leaving]
            candidates = {r.request_id: r for r in (*swapped_out, *self.ready)}
            admitted = [candidates[request_id] for request_id in decided.admit]
            members = [r for r in self.residents if r.request_id not in leaving] + admitted
            if decided.step is not None:
                chosen = set(decided.step)
                members = [r for r in members if r.request_id in chosen]
        seconds = self.instance.step_times.decode_step_s(len(members), sum(r.context_tokens for r in members))
        return DecodeAnswer(
            self.instance.instance_id,
            [r.request_id for r in swapped_out],
            [r.request_id for r in admitted],
            [r.request_id for r in members],
            seconds if members else None,
            DecodeReason(
                code,
                resident_requests,
                ready_requests,
                self.sum_context_tokens,
                None if tightest_s == NO_TARGET_S else tightest_s,
            ),
        )

    def _make_room(self) -> list[Resident]:
        """The last admitted leave while the tokens of the next step would not fit, and wait at the front."""
        left: list[Resident] = []
        sum_context_tokens = self.sum_context_tokens
        while len(self.residents) > 1 and sum_context_tokens + len(self.residents) > self.instance.kv_tokens:
            leaving = self.residents.pop()
            sum_context_tokens -= leaving.context_tokens
            self.ready.insert(0, leaving)
            left.append(leaving)
        return left

    def _code(self, reason: Reason) -> DecodeCode:
        can = self.instance.control.capabilities
        if not (can.decode_admission and can.participation):
            return DecodeCode.NOT_CONTROLLED
        return DecodeCode.FALLBACK if reason is Reason.FALLBACK else DecodeCode.POLICY


class DecodeStage:
    """All decode instances of a snapshot under one Decider."""

    def __init__(self, decider: Decider, targets: Targets, now_s: float) -> None:
        self.decider, self.targets, self.now_s = decider, targets, now_s
        self.batches: dict[str, Batch] = {}
        self.placements: list[Placement] = []
        self.unserved: list[TransferredRequest] = []
        self._able_by_model: dict[str, list[Batch]] = {}

    def add_instance(self, told: Instance, serves: frozenset[str], step_times: StepTimes) -> None:
        """Take an instance in; they come in index order."""
        self.batches[told.instance_id] = Batch(told, serves, step_times, self.decider)

    def serves(self, model: str) -> bool:
        """Whether a request for a model can be decoded; a snapshot without decode instances says nothing about it."""
        return not self.batches or bool(self._able(model))

    def _able(self, model: str) -> list[Batch]:
        able = self._able_by_model.get(model)
        if able is None:
            able = [batch for batch in self.batches.values() if not model or model in batch.serves]
            self._able_by_model[model] = able
        return able

    def add_residents(self, residents: Sequence[ResidentRequest]) -> None:
        """Take in who is in a batch."""
        for told in residents:
            self.batches[told.instance_id].hold(self._resident(told, self.now_s))

    def expect_dispatched(self, requests: Sequence[WaitingRequest] | Sequence[RunningRequest]) -> None:
        """Count those that found their decode instance at dispatch and are not through prefill."""
        for told in requests:
            if told.decode_instance_id is not None:
                self.batches[told.decode_instance_id].expect(told.prompt_tokens)

    def add_transferred(self, transferred: Sequence[TransferredRequest], place_at_ready: bool) -> None:
        """Take in who has left prefill: those with an instance as listed, then the others find one, in ready order.

        Args:
            place_at_ready: whether a request whose KV is on its way finds its instance only when it is there.
        """
        now_s = self.now_s
        entries = [(now_s if told.ready_s is None else told.ready_s, told.request_id, told) for told in transferred]
        for ready_s, _, told in entries:
            if told.instance_id is not None:
                self._let_wait(self.batches[told.instance_id], self._resident(told, ready_s))
        entries.sort(key=lambda entry: entry[:2])
        for ready_s, _, told in entries:
            if told.instance_id is not None or (ready_s > now_s and place_at_ready):
                continue
            resident = self._resident(told, ready_s)
            batch = self.place(resident, told.model)
            if batch is None:
                self.unserved.append(told)
            else:
                self._let_wait(batch, resident)

    def place_dispatched(self, request: WaitingRequest) -> None:
        """Choose the decode instance of a request together with its prefill instance."""
        _, tpot_s = self.targets(request.slo_class)
        tpot_s = request.tpot_target_s or tpot_s
        context, now_s = request.prompt_tokens + 1, self.now_s
        due_s = token_deadline_s(now_s, tpot_s, 1)
        resident = Resident(
            request.request_id, context, 1, now_s, due_s, tpot_s, now_s, now_s, request.slo_class, request.tenant
        )
        batch = self.place(resident, request.model)
        if batch is not None:
            batch.expect(request.prompt_tokens)

    def place(self, resident: Resident, model: str) -> Batch | None:
        """The instance that the placement policy chooses; None when nothing serves the model."""
        able = self._able(model)
        if not able:
            return None
        batch = able[0]
        if len(able) > 1:
            loads = [batch.load() for batch in able]
            batch = self.batches[self.decider.place_decode(DecodePlacementView(self.now_s, resident, loads))]
        self.placements.append(Placement(resident.request_id, batch.instance.instance_id))
        return batch

    def _let_wait(self, batch: Batch, resident: Resident) -> None:
        if resident.ready_s <= self.now_s:
            batch.let_wait(resident)
        else:
            batch.expect(resident.context_tokens)

    def decide(self) -> list[DecodeAnswer]:
        """What every instance does next."""
        return [batch.decide(self.decider, self.now_s) for batch in self.batches.values()]

    def _resident(self, told: TransferredRequest | ResidentRequest, ready_s: float) -> Resident:
        ttft_s, tpot_s = self.targets(told.slo_class)
        if told.tpot_target_s is not None:
            tpot_s = told.tpot_target_s
        if told.ttft_target_s is not None:
            ttft_s = told.ttft_target_s
        if told.output_tokens or told.arrival_s is None:
            first_s = self.now_s if told.first_token_s is None else told.first_token_s
            due_s = token_deadline_s(first_s, tpot_s, told.output_tokens)
        else:
            first_s, due_s = self.now_s, ttft_deadline_s(told.arrival_s, ttft_s)
        return Resident(
            told.request_id,
            told.context_tokens,
            told.output_tokens,
            first_s,
            due_s,
            tpot_s,
            ready_s,
            self.now_s if told.last_token_s is None else told.last_token_s,
            told.slo_class,
            told.tenant,
        )
