"""A snapshot and its answer as records are made from it; what several records need is worked out once."""

from bisect import bisect_right
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.service.decisions.record import (
    MOST_ALTERNATIVES,
    Asked,
    DecisionRecord,
    Elsewhere,
    First,
    Queue,
    Rule,
    Spread,
    pack,
)
from kairos.scheduler_core.service.prefill import part_in_flight
from kairos.scheduler_core.service.profiles import Profiles
from kairos.scheduler_core.service.schedule import Decided
from kairos.scheduler_core.service.schemas import (
    DecodeAnswer,
    Instance,
    Placement,
    PrefillAnswer,
    Rejection,
    TransferredRequest,
    WaitingRequest,
)
from kairos.scheduler_core.service.store.queries.decisions import DecisionRow, KeptFor


class _Line:
    """What is planned on one prefill instance, in the order in which it starts."""

    def __init__(self, free_in_s: float, entries: list[PrefillAnswer]) -> None:
        self.entries = entries
        self._starts = [entry.reason.ahead_s for entry in entries]
        ends = (entry.predicted_ttft_s - entry.reason.waited_s for entry in entries)
        self._ends = [free_in_s, *accumulate(ends, max)]

    @cached_property
    def seconds(self) -> Spread:
        """Predicted seconds of everyone in it."""
        return Spread.of([entry.predicted_prefill_s for entry in self.entries])

    def behind(self, start_s: float) -> tuple[float, int]:
        """When it is free of all that starts by then, and how many those are."""
        before = bisect_right(self._starts, start_s)
        return self._ends[before], before


class Scene:
    """One decision, to be told request by request."""

    def __init__(self, decided: Decided, profiles: Profiles) -> None:
        self.decided, self._profiles = decided, profiles
        self._snapshot, self._answer = decided.snapshot, decided.answer

    # -- rows

    def prefill(self, entry: PrefillAnswer, kept_for: KeptFor) -> DecisionRow:
        """Where a waiting request stands."""
        told, reason = self._waiting[entry.request_id], entry.reason
        deadline_s, bound = entry.ttft_deadline_s, told.instance_id is not None
        line = self._lines[entry.instance_id]
        record = DecisionRecord(
            "prefill",
            self._rule(entry.instance_id),
            Asked(told.prompt_tokens, told.cached_tokens, told.slo_class),
            self._queue,
            instance_id=entry.instance_id,
            code=reason.code,
            chosen_by=reason.chosen_by or "",
            order=entry.order,
            step_tokens=entry.step_tokens,
            bound=bound,
            decode_instance_id=self._placed_on.get(entry.request_id, told.decode_instance_id or ""),
            waited_s=reason.waited_s,
            ahead_requests=reason.ahead_requests,
            ahead_s=reason.ahead_s,
            predicted_prefill_s=entry.predicted_prefill_s,
            predicted_ttft_s=entry.predicted_ttft_s,
            ttft_target_s=None if deadline_s is None else deadline_s - told.arrival_s,
            on_time=entry.on_time,
            laxity_s=reason.laxity_s,
            line=line.seconds,
        )
        elsewhere = [] if bound else sorted(self._elsewhere(entry, told), key=lambda e: e.seconds)
        first = [
            First(str(e.request_id), e.predicted_prefill_s, e.predicted_ttft_s, e.on_time)
            for e in line.entries[: min(MOST_ALTERNATIVES, line.behind(reason.ahead_s)[1])]
            if e is not entry
        ]
        return self._row(told, kept_for, pack(record, elsewhere, first))

    def rejected(self, rejection: Rejection) -> DecisionRow:
        """A request that is not taken."""
        told = self._told(rejection.request_id)
        record = DecisionRecord(
            "admission",
            self._rule(),
            _asked(told),
            self._queue,
            code=rejection.reason,
            status=rejection.status,
            retry_after_s=rejection.retry_after_s,
        )
        return self._row(told, "rejected", pack(record))

    def placed(self, placement: Placement, kept_for: KeptFor) -> DecisionRow:
        """A request that got its decode instance."""
        return self._decode(placement.request_id, self._batches[placement.instance_id], "placed", kept_for)

    def admitted(self, request_id: RequestId, step: DecodeAnswer) -> DecisionRow:
        """A request that joined a batch because the decode policy failed."""
        return self._decode(request_id, step, step.reason.code, "failed")

    def _decode(self, request_id: RequestId, step: DecodeAnswer, code: str, kept_for: KeptFor) -> DecisionRow:
        told = self._told(request_id)
        record = DecisionRecord(
            "decode",
            self._rule(step.instance_id),
            _asked(told),
            self._queue,
            instance_id=step.instance_id,
            code=code,
            predicted_step_s=step.predicted_step_s,
        )
        others = [
            Elsewhere(other.instance_id, other.predicted_step_s or 0.0, other.reason.resident_requests)
            for other in self._answer.decode
            if other is not step and self._serves(self._instances[other.instance_id], told)
        ]
        return self._row(told, kept_for, pack(record, sorted(others, key=lambda e: e.seconds)))

    def _row(self, told: WaitingRequest | TransferredRequest, kept_for: KeptFor, body: bytes) -> DecisionRow:
        at = datetime.fromtimestamp(self.decided.at_s, UTC)
        return DecisionRow(at, str(told.request_id), told.tenant or None, self._answer.decision_id, kept_for, body)

    # -- what a row is made of

    def _rule(self, instance_id: str = "") -> Rule:
        strategy, version = self.decided.strategy, ""
        if instance_id:
            version = self._answer.model_versions[self._instances[instance_id].profile]
        return Rule(strategy.name, strategy.text, version, self.decided.failures)

    def _elsewhere(self, entry: PrefillAnswer, told: WaitingRequest) -> Iterable[Elsewhere]:
        """The other instances that it could run on, behind what starts there no later than it does here."""
        for instance in self._instances.values():
            if instance.role != "prefill" or instance.instance_id == entry.instance_id:
                continue
            if self._serves(instance, told):
                free_s, requests = self._lines[instance.instance_id].behind(entry.reason.ahead_s)
                cached = told.cached_tokens_by_instance.get(instance.instance_id, told.cached_tokens)
                times = self._profiles.find(instance.profile).step_times
                seconds = times.remaining_prefill_s(told.prompt_tokens - cached, cached, instance.chunk_tokens)
                yield Elsewhere(instance.instance_id, entry.reason.waited_s + free_s + seconds, requests)

    def _serves(self, instance: Instance, told: WaitingRequest | TransferredRequest) -> bool:
        serves = instance.serves or [self._profiles.find(instance.profile).model]
        return not told.model or told.model in serves

    @cached_property
    def _instances(self) -> dict[str, Instance]:
        return {instance.instance_id: instance for instance in self._snapshot.instances}

    @cached_property
    def _waiting(self) -> dict[RequestId, WaitingRequest]:
        return {request.request_id: request for request in self._snapshot.waiting}

    @cached_property
    def _transferred(self) -> dict[RequestId, TransferredRequest]:
        return {request.request_id: request for request in self._snapshot.transferred}

    def _told(self, request_id: RequestId) -> WaitingRequest | TransferredRequest:
        return self._transferred.get(request_id) or self._waiting[request_id]

    @cached_property
    def _batches(self) -> dict[str, DecodeAnswer]:
        return {step.instance_id: step for step in self._answer.decode}

    @cached_property
    def _placed_on(self) -> dict[RequestId, str]:
        return {placement.request_id: placement.instance_id for placement in self._answer.placements}

    @cached_property
    def _lines(self) -> dict[str, _Line]:
        planned: dict[str, list[PrefillAnswer]] = {}
        for entry in self._answer.prefill:
            planned.setdefault(entry.instance_id, []).append(entry)
        for entries in planned.values():
            entries.sort(key=lambda entry: (entry.reason.ahead_s, entry.order))
        return {
            name: _Line(self._free_in_s(instance), planned.get(name, []))
            for name, instance in self._instances.items()
            if instance.role == "prefill"
        }

    def _free_in_s(self, instance: Instance) -> float:
        """Until the step in flight ends."""
        if instance.free_in_s is not None:
            return instance.free_in_s
        parts = [
            part_in_flight(request, instance.chunk_tokens)
            for request in self._snapshot.running
            if request.instance_id == instance.instance_id
        ]
        return self._profiles.find(instance.profile).step_times.prefill_step_s(parts) if parts else 0.0

    @cached_property
    def _queue(self) -> Queue:
        snapshot, entries = self._snapshot, self._answer.prefill
        return Queue(
            Spread.of([request.prompt_tokens for request in snapshot.waiting]),
            Spread.of([entry.reason.waited_s for entry in entries]),
            sum(not entry.on_time for entry in entries),
            len(snapshot.running),
            len(snapshot.transferred),
            len(snapshot.resident),
        )


def _asked(told: WaitingRequest | TransferredRequest) -> Asked:
    if isinstance(told, TransferredRequest):
        return Asked(told.context_tokens, slo_class=told.slo_class)
    return Asked(told.prompt_tokens, told.cached_tokens, told.slo_class)
