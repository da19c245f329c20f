"""Where an announced request goes: admission, then both placements, by the Decider of the active strategy.

The queue of an instance is its engine's own, first come first served: a request is predicted to begin once everything
that was sent to its instance before is through. A placement policy that binds late leaves the choice to whichever
instance is free first; here that is the one predicted to be done with the request first.
"""

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, DecodeInstance, PrefillInstance, Resident, Waiting
from kairos.scheduler_core.errors import FieldsError, NotAdmittedError, UnknownNameError
from kairos.scheduler_core.policy import (
    AdmissionView,
    DecodeLoad,
    DecodePlacementView,
    PrefillLoad,
    PrefillPlacementView,
)
from kairos.scheduler_core.service.decisions.record import Asked, DecisionRecord, Elsewhere, Queue, Rule, Spread
from kairos.scheduler_core.service.managed.fleet import LiveFleet, Member
from kairos.scheduler_core.service.managed.load import Load
from kairos.scheduler_core.service.managed.reservation import Met, Terms
from kairos.scheduler_core.service.managed.schemas import Announcement
from kairos.scheduler_core.service.prefill import waiting_view
from kairos.scheduler_core.service.profiles import KnownProfile, Profiles
from kairos.scheduler_core.service.schedule import Scheduler
from kairos.scheduler_core.service.schemas import WaitingRequest
from kairos.scheduler_core.slo import NO_TARGET_S, is_lost, token_deadline_s
from kairos.scheduler_core.strategy import Strategy

NO_INSTANCE = "no_instance_serves_model"


class _Engine(NamedTuple):
    """A member of the fleet with its step times."""

    member: Member
    known: KnownProfile
    serves: frozenset[str]
    prefill: PrefillInstance
    decode: DecodeInstance

    def can_serve(self, model: str) -> bool:
        return not model or model in self.serves


class Choice(NamedTuple):
    """What was decided about an announcement, and what it was chosen from."""

    terms: Terms | None
    """None: it was refused."""
    record: DecisionRecord
    elsewhere: list[Elsewhere]
    refusal: NotAdmittedError | None = None


class Placer:
    """Decides about announcements; whoever calls it holds the lock of the load."""

    def __init__(self, scheduler: Scheduler, fleet: LiveFleet, load: Load, retry_after_s: float) -> None:
        self._scheduler, self._fleet, self._load = scheduler, fleet, load
        self._retry_after_s = math.ceil(retry_after_s)
        self._decider: Decider | None = None
        self._engines: tuple[Mapping[str, Member], Profiles, list[_Engine]] | None = None

    def place(self, asked: Announcement, digest: str, arrival_s: float, now_s: float, ttl_s: float) -> Choice:
        """Where a request goes, and what is predicted of it.

        Raises:
            FieldsError: its class is none of the configuration's.
        """
        decider = self._decider_of(self._scheduler.strategy(None))
        failures = dict(decider.validity.fallbacks)
        request = self._waiting(asked, arrival_s)
        prefill, decode = self._able("prefill", asked.model), self._able("decode", asked.model)
        if not prefill or not (decode or self._has_no_decode()):
            return self._refused(asked, decider, now_s, *self._nobody(asked.model))
        loads = [self._prefill_load(engine, request, now_s) for engine in prefill]
        ttfts_s = [now_s - arrival_s + load.outstanding_s + load.prefill_s for load in loads]
        others = sum(load.waiting_requests for load in loads)
        views = [waiting_view(request, engine.prefill, self._scheduler.targets.__getitem__) for engine in prefill]
        answer = decider.admit(AdmissionView(now_s, views[0], min(ttfts_s), others))
        if not answer.accept:
            refusal = NotAdmittedError(answer.status, answer.reason, answer.retry_after_s)
            return self._refused(asked, decider, now_s, refusal)
        place = self._place_prefill(decider, views[0], loads, ttfts_s, now_s)
        chosen, view, ttft_s = prefill[place], views[place], ttfts_s[place]
        home = self._place_decode(decider, asked, view, decode, now_s)
        terms = self._terms(asked, digest, decider.strategy.name, chosen, view, home, ttft_s, arrival_s, ttl_s)
        elsewhere = [
            Elsewhere(engine.member.instance_id, seconds, load.waiting_requests)
            for number, (engine, load, seconds) in enumerate(zip(prefill, loads, ttfts_s, strict=True))
            if number != place
        ]
        record = DecisionRecord(
            "admission",
            self._rule(decider, chosen.known.version, failures),
            Asked(asked.prompt_tokens, view.cached_tokens, asked.slo_class),
            self._queue(),
            instance_id=terms.prefill_instance,
            decode_instance_id=terms.decode_instance,
            ahead_requests=loads[place].waiting_requests,
            ahead_s=loads[place].outstanding_s,
            waited_s=now_s - arrival_s,
            predicted_prefill_s=view.prefill_s,
            predicted_ttft_s=ttft_s,
            predicted_step_s=terms.predicted_tpot_s,
            ttft_target_s=terms.ttft_target_s,
            on_time=not is_lost(arrival_s, ttft_s, view.deadline_s),
            laxity_s=None if view.deadline_s == NO_TARGET_S else view.deadline_s - arrival_s - ttft_s,
        )
        return Choice(terms, record, sorted(elsewhere, key=lambda e: e.seconds))

    # -- what there is

    def _decider_of(self, strategy: Strategy) -> Decider:
        if self._decider is None or self._decider.strategy is not strategy:
            self._decider = Decider(strategy, self._scheduler.settings.guards.deferred_share)
        return self._decider

    def _all_engines(self) -> list[_Engine]:
        """The fleet with its step times; made anew when either is another."""
        members, profiles = self._fleet.members, self._scheduler.profiles
        if self._engines is None or self._engines[0] is not members or self._engines[1] is not profiles:
            self._engines = members, profiles, [_engine(member, profiles) for member in members.values()]
        return self._engines[2]

    def _able(self, role: str, model: str) -> list[_Engine]:
        return [
            engine
            for engine in self._all_engines()
            if engine.member.told.role == role
            and engine.can_serve(model)
            and self._fleet.state_of(engine.member) == "active"
        ]

    def _has_no_decode(self) -> bool:
        return all(member.told.role == "prefill" for member in self._fleet.members.values())

    def _nobody(self, model: str) -> tuple[NotAdmittedError]:
        """That nothing takes the request: for good (404), or until an instance is well (503)."""
        known = not model or any(engine.can_serve(model) for engine in self._all_engines())
        if known:
            return (NotAdmittedError(503, NO_INSTANCE, self._retry_after_s),)
        return (NotAdmittedError(404, NO_INSTANCE, None),)

    def _waiting(self, asked: Announcement, arrival_s: float) -> WaitingRequest:
        classes = self._scheduler.targets
        if asked.slo_class not in classes:
            raise FieldsError([("slo_class", str(UnknownNameError("SLO class", asked.slo_class, classes)))])
        return WaitingRequest(
            asked.request_id,
            arrival_s,
            asked.prompt_tokens,
            asked.cached_tokens,
            asked.cached_tokens_by_instance,
            slo_class=asked.slo_class,
            ttft_target_s=asked.ttft_target_s,
            tenant=asked.tenant,
        )

    def _prefill_load(self, engine: _Engine, request: WaitingRequest, now_s: float) -> PrefillLoad:
        totals = self._load.on_prefill(engine.member.instance_id)
        view = waiting_view(request, engine.prefill, self._scheduler.targets.__getitem__)
        return PrefillLoad(
            engine.prefill,
            totals.requests,
            totals.tokens,
            totals.outstanding_s(now_s),
            view.prefill_s,
            view.cached_tokens,
        )

    # -- choices

    def _place_prefill(
        self, decider: Decider, view: Waiting, loads: Sequence[PrefillLoad], ttfts_s: Sequence[float], now_s: float
    ) -> int:
        place = None
        if len(loads) > 1:
            place = decider.place_prefill(PrefillPlacementView(now_s, view, loads))
        if place is None:
            return min(range(len(loads)), key=lambda number: ttfts_s[number])
        return next(number for number, load in enumerate(loads) if load.instance.instance_id == place)

    def _place_decode(
        self, decider: Decider, asked: Announcement, view: Waiting, able: Sequence[_Engine], now_s: float
    ) -> _Engine | None:
        if len(able) < 2:
            return able[0] if able else None
        tpot_s = self._tpot_target_s(asked)
        due_s = token_deadline_s(now_s, tpot_s, 1)
        resident = Resident(
            view.request_id,
            asked.prompt_tokens + 1,
            1,
            now_s,
            due_s,
            tpot_s,
            now_s,
            now_s,
            asked.slo_class,
            asked.tenant,
        )
        loads = []
        for engine in able:
            totals = self._load.on_decode(engine.member.instance_id)
            loads.append(
                DecodeLoad(
                    engine.decode,
                    totals.batch_size,
                    totals.sum_context_tokens,
                    totals.waiting_requests,
                    totals.waiting_tokens,
                    totals.tightest_tpot_s,
                )
            )
        place = decider.place_decode(DecodePlacementView(now_s, resident, loads))
        return next(engine for engine in able if engine.member.instance_id == place)

    def _tpot_target_s(self, asked: Announcement) -> float:
        return asked.tpot_target_s or self._scheduler.targets[asked.slo_class][1]

    # -- what is told of it

    def _terms(
        self,
        asked: Announcement,
        digest: str,
        strategy: str,
        chosen: _Engine,
        view: Waiting,
        home: _Engine | None,
        ttft_s: float,
        arrival_s: float,
        ttl_s: float,
    ) -> Terms:
        there = self._load.on_prefill(chosen.member.instance_id)
        context, step_s, usage = 0, None, 0.0
        if home is not None:
            decode = self._load.on_decode(home.member.instance_id)
            context = decode.sum_context_tokens + decode.waiting_tokens
            requests = decode.batch_size + decode.waiting_requests + 1
            step_s = home.decode.step_times.decode_step_s(requests, context + asked.prompt_tokens + 1)
            usage = min(1.0, context / home.decode.kv_tokens)
        profile = self._scheduler.settings.profiles[chosen.known.name].as_profile()
        tpot_target_s = self._tpot_target_s(asked)
        return Terms(
            asked.request_id,
            digest,
            uuid.uuid4().hex[:24],
            arrival_s,
            ttl_s,
            asked.prompt_tokens,
            view.cached_tokens,
            asked.tenant,
            asked.slo_class,
            None if view.ttft_target_s == NO_TARGET_S else view.ttft_target_s,
            None if tpot_target_s == NO_TARGET_S else tpot_target_s,
            chosen.member.instance_id,
            "" if home is None else home.member.instance_id,
            view.prefill_s,
            ttft_s,
            step_s,
            strategy,
            chosen.known.version,
            (profile.gpu, profile.model, profile.precision, profile.tp, profile.ep, profile.engine),
            Met(there.running, there.requests - there.running, there.tokens, context, usage),
        )

    def _refused(self, asked: Announcement, decider: Decider, now_s: float, refusal: NotAdmittedError) -> Choice:
        record = DecisionRecord(
            "admission",
            self._rule(decider, "", {}),
            Asked(asked.prompt_tokens, asked.cached_tokens, asked.slo_class),
            self._queue(),
            code=refusal.reason,
            status=refusal.http_status,
            retry_after_s=refusal.retry_after_s,
        )
        return Choice(None, record, [], refusal)

    def _rule(self, decider: Decider, version: str, before: Mapping[str, int]) -> Rule:
        strategy = decider.strategy
        failed = [name for name, count in decider.validity.fallbacks.items() if count > before.get(name, 0)]
        return Rule(strategy.name, strategy.text, version, failed)

    def _queue(self) -> Queue:
        """What there is on the whole fleet; single requests are not looked at."""
        prefill, decode = self._load.prefill.values(), self._load.decode.values()
        waiting = sum(totals.requests - totals.running for totals in prefill)
        return Queue(
            Spread(waiting),
            running=sum(totals.running for totals in prefill),
            transferred=max(0, sum(t.waiting_requests for t in decode) - sum(t.requests for t in prefill)),
            resident=sum(totals.batch_size for totals in decode),
        )


def _engine(member: Member, profiles: Profiles) -> _Engine:
    told, known = member.told, profiles.find(member.told.profile)
    name, times = member.instance_id, known.step_times
    return _Engine(
        member,
        known,
        frozenset(told.serves or [known.model]),
        PrefillInstance(name, times, told.chunk_tokens, told.max_requests_per_step, told.control),
        DecodeInstance(
            name,
            times,
            told.max_batch,
            told.kv_tokens or UNLIMITED_TOKENS,
            told.batch_limit or UNLIMITED_TOKENS,
            told.control,
        ),
    )
