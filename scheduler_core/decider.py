"""The Decider: view -> policy -> guards -> decision. The same object in simulator, service, gateway and engine.

It holds the policies of one strategy and their state, reads no clock of its own (the time budget excepted) and does no
I/O. A `PrefillLane` is one prefill instance as the Decider sees it: its own queue, the queue it shares with others
under `late`, what it runs, and its share guard.
"""

from collections.abc import Iterable, Sequence, Set
from itertools import islice

import msgspec

from kairos.scheduler_core.decision import DecodeDecision, PrefillDecision, Reason
from kairos.scheduler_core.domain import DecodeInstance, Part, PrefillInstance, RequestId, Resident, Waiting
from kairos.scheduler_core.guards import ShareGuard, ValidityGuard, check_decode_plan, check_order
from kairos.scheduler_core.plugins import build_policy
from kairos.scheduler_core.policy import (
    Admission,
    AdmissionView,
    DecodePlacementView,
    DecodePlan,
    DecodePolicy,
    DecodeStep,
    DecodeView,
    Observer,
    Peer,
    PrefillPlacementView,
    PrefillStep,
    PrefillView,
)
from kairos.scheduler_core.queue import WaitingQueue, arrival_key, deadline_key, merged
from kairos.scheduler_core.slo import NO_TARGET_S
from kairos.scheduler_core.strategy import PrefillRule, Strategy, build_prefill


class PrefillLane:
    """One prefill instance: where its requests wait and what it has begun."""

    def __init__(self, instance: PrefillInstance, rule: PrefillRule, guard: ShareGuard, shared: WaitingQueue | None):
        self.instance = instance
        self.use(rule)
        self.guard = guard
        self.own = WaitingQueue()
        """Requests bound to this instance, begun ones included."""
        self.shared = shared
        """Requests that any of several instances may take; None when there is no such queue."""
        self.current: RequestId | None = None
        """The unfinished prompt that goes on when the rule does not preempt."""
        self.owed: Waiting | None = None
        """Who waited for its due while the last decided step ran."""

    def use(self, rule: PrefillRule) -> None:
        """Let a rule order what waits here from the next decision on."""
        self.rule = rule
        self.observes = isinstance(rule.policy, Observer)

    def find(self, request_id: RequestId) -> Waiting | None:
        """A request that this instance may run."""
        found = self.own.get(request_id)
        return found if found is not None or self.shared is None else self.shared.get(request_id)

    def waits(self) -> bool:
        """Whether there is anything to run."""
        return bool(len(self.own) or (self.shared is not None and len(self.shared)))

    def oldest_owed(self) -> Waiting | None:
        """The oldest lost or deferred request of both queues."""
        owed = [q.oldest_owed() for q in (self.own, self.shared) if q is not None]
        return min((w for w in owed if w is not None), key=arrival_key, default=None)

    def queues(self) -> tuple[WaitingQueue, ...]:
        """Its queues."""
        return (self.own,) if self.shared is None else (self.own, self.shared)


class Decider:
    """The policies of one strategy, under the two guards.

    Args:
        strategy: which policies.
        deferred_share: the share guard's share; 0 switches it off.
        budget_s: seconds a decision may take before arrival order replaces it; None = no limit.

    Raises:
        UnknownPolicyError, ConfigError: a policy that is not installed or refuses its parameters.
    """

    def __init__(self, strategy: Strategy, deferred_share: float = 0.05, budget_s: float | None = None) -> None:
        self.strategy = strategy.check()
        self.validity = ValidityGuard(budget_s)
        self._deferred_share = deferred_share
        self._prefill_placement = build_policy(
            "prefill_placement", strategy.prefill_placement.name, strategy.prefill_placement.parameters
        )
        self._decode_placement = build_policy(
            "decode_placement", strategy.decode_placement.name, strategy.decode_placement.parameters
        )
        self._admission = build_policy("admission", strategy.admission.name, strategy.admission.parameters)
        self.needs_prediction: bool = self._admission.needs_prediction
        """Whether `admit` needs the predicted TTFT of the arriving request."""
        self.accepts_all = strategy.admission.name == "accept-all"

    # -- prefill

    def prefill_rule(self) -> PrefillRule:
        """A new prefill policy with a state of its own: one for each queue."""
        return build_prefill(self.strategy.prefill)

    def prefill_lane(
        self, instance: PrefillInstance, rule: PrefillRule, shared: WaitingQueue | None = None
    ) -> PrefillLane:
        """A lane for an instance; lanes that share a queue share its rule."""
        return PrefillLane(instance, rule, ShareGuard(self._deferred_share), shared)

    def next_prefill(
        self, lane: PrefillLane, now_s: float, peers: Sequence[Peer] = (), wanted: int = 1
    ) -> PrefillDecision | None:
        """What a free prefill instance runs next; None when nothing waits.

        Args:
            wanted: how many requests of an ordering rule may share the step, where the engine fills its steps itself;
                a packing rule says that for itself.
        """
        for queue in lane.queues():
            queue.settle(now_s)
        if not lane.waits():
            return None
        if lane.rule.packs:
            wanted = 1
        chosen, reason = self._has_the_floor(lane) or self._ask(lane, now_s, peers, wanted)
        if len(chosen) < wanted and reason in (Reason.SHARE_GUARD, Reason.CONTINUES):
            others, _ = self._ask(lane, now_s, peers, wanted)
            chosen += [w for w in others if w.request_id != chosen[0].request_id][: wanted - 1]
        if not chosen:
            return None  # all that waits is left to peers that have its prefix
        if reason is Reason.SHARE_GUARD and lane.guard.pinned != chosen[0].request_id:
            lane.guard.give_floor(chosen[0])
        decision = _fill_step(chosen, lane.instance, reason)
        owed = lane.oldest_owed() if lane.guard.share else None
        lane.owed = None if owed is None or owed in decision.requests else owed
        return decision

    def prefill_order(self, lane: PrefillLane, now_s: float, peers: Sequence[Peer] = ()) -> list[Waiting]:
        """Everything that waits for an instance, in the order of the policy: for explanations and predictions."""
        for queue in lane.queues():
            queue.settle(now_s)
        everything = sum(len(queue) for queue in lane.queues())
        if not everything:
            return []
        first, _ = self._has_the_floor(lane) or ([], Reason.POLICY)
        ordered, _ = self._ask(lane, now_s, peers, wanted=everything)
        seen = {w.request_id: w for w in (*first, *ordered)}
        return list(seen.values())

    def _has_the_floor(self, lane: PrefillLane) -> tuple[list[Waiting], Reason] | None:
        """Who runs next whatever the policy would say; None when that is up to the policy."""
        guard, rule = lane.guard, lane.rule
        if guard.pinned is not None and (pinned := lane.own.get(guard.pinned)) is not None:
            return [pinned], Reason.SHARE_GUARD
        preempts = rule.preempt and lane.instance.control.capabilities.preempt
        if not preempts and lane.current is not None and (current := lane.own.get(lane.current)) is not None:
            return [current], Reason.CONTINUES
        if guard.share and guard.covers(owed := lane.oldest_owed()) and owed is not None:
            return [owed], Reason.SHARE_GUARD
        return None

    def _ask(self, lane: PrefillLane, now_s: float, peers: Sequence[Peer], wanted: int) -> tuple[list[Waiting], Reason]:
        rule = lane.rule
        view = _view(lane, now_s, peers, wanted)
        lost = view.lost if rule.lost_last else ()
        together = 1
        if not view.waiting:
            return list(islice(lost, wanted)), Reason.LOST_LAST
        try:
            started_s = self.validity.start()
            if rule.packs:
                plan = rule.policy.plan(view)
                order: Sequence[RequestId] = plan.order
                if lane.instance.control.capabilities.pack:
                    together = min(plan.together, lane.instance.max_requests_per_step)
                needed = min(max(wanted, together), len(view.waiting))
            else:
                order = rule.policy.order(view)
                needed = min(wanted, len(view.waiting))
            self.validity.check_budget(started_s)
            if not together >= 1:  # NaN too
                raise ValueError(f"packs {together} requests into a step")
            check_order(order, needed, lambda request_id: lane.find(request_id) is not None)
        except Exception as problem:  # a plugin's: arrival order instead
            self.validity.note(rule.policy, problem)
            return list(islice((*view.waiting, *lost), wanted)), Reason.FALLBACK
        chosen = [found for request_id in order[:needed] if (found := lane.find(request_id)) is not None]
        chosen.extend(islice(lost, max(0, wanted - len(chosen))))
        return chosen, Reason.POLICY

    def prefill_started(self, lane: PrefillLane, decision: PrefillDecision) -> None:
        """Bind the requests of a decision to its instance; the caller replaces their views after the step."""
        for request in decision.requests:
            for queue in lane.queues():
                queue.note_started(request)
        lane.current = decision.requests[-1].request_id

    def prefill_started_at_once(self, lane: PrefillLane, request: Waiting) -> None:
        """Bind a request that came while nothing waited and there was room: no policy had anything to decide."""
        for queue in lane.queues():
            queue.note_started(request)
        lane.current, lane.owed = request.request_id, None

    def prefill_ended(self, lane: PrefillLane, seconds: float, new_tokens: int, done: Iterable[RequestId]) -> None:
        """Account for a step that ended; `done` are the prompts that it completed."""
        lane.guard.fill(seconds, lane.owed)
        for request_id in done:
            lane.guard.release(request_id)
            if lane.current == request_id:
                lane.current = None
        if lane.observes:
            self._observe(lane.rule.policy, PrefillStep(seconds, new_tokens))

    # -- decode

    def decode_policy(self, instance: DecodeInstance) -> DecodePolicy:
        """A new decode policy with a state of its own: one for each instance that lets Kairos batch."""
        capabilities = instance.control.capabilities
        controlled = capabilities.decode_admission and capabilities.participation
        choice = self.strategy.decode
        policy: DecodePolicy = (
            build_policy("decode", choice.name, choice.parameters)
            if controlled
            else build_policy("decode", "continuous", {})
        )
        return policy

    def next_decode(self, policy: DecodePolicy, view: DecodeView) -> DecodeDecision:
        """What a decode instance does next; arrival order by KV room when the policy fails."""
        try:
            started_s = self.validity.start()
            plan = policy.step(view)
            if self.validity.budget_s is not None:
                self.validity.check_budget(started_s)
            if plan.admit or plan.step is not None or plan.swap_out:
                check_decode_plan(plan, view)
            elif not view.residents and view.ready:
                raise ValueError("admits nobody to an empty instance")
        except Exception as problem:  # a plugin's: everyone who fits instead
            self.validity.note(policy, problem)
            return DecodeDecision(_everyone_who_fits(view), Reason.FALLBACK)
        return DecodeDecision(plan, Reason.POLICY)

    def decode_ended(self, policy: DecodePolicy, step: DecodeStep) -> None:
        """Show a step that ended to a policy that learns from it."""
        self._observe(policy, step)

    # -- placement and admission

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The instance of an arriving request; None = whichever is free first."""
        try:
            place: str | None = self._prefill_placement.place_prefill(view)
            if place is not None and all(load.instance.instance_id != place for load in view.instances):
                raise ValueError(f"placed on {place!r}, which is not offered")
        except Exception as problem:  # a plugin's: the least loaded instance instead
            self.validity.note(self._prefill_placement, problem)
            return min(view.instances, key=lambda load: load.tokens_in_flight).instance.instance_id
        return place

    def place_decode(self, view: DecodePlacementView) -> str:
        """The decode instance of a request."""
        try:
            place: str = self._decode_placement.place_decode(view)
            if all(load.instance.instance_id != place for load in view.instances):
                raise ValueError(f"placed on {place!r}, which is not offered")
        except Exception as problem:  # a plugin's: the least loaded instance instead
            self.validity.note(self._decode_placement, problem)
            return min(view.instances, key=lambda load: load.batch_size + load.waiting_requests).instance.instance_id
        return place

    def admit(self, view: AdmissionView) -> Admission:
        """Whether an arriving request is taken; a failing policy takes it."""
        try:
            answer: Admission = self._admission.admit(view)
        except Exception as problem:  # a plugin's: accept instead
            self.validity.note(self._admission, problem)
            return Admission(accept=True)
        return answer

    def _observe(self, policy: object, step: PrefillStep | DecodeStep) -> None:
        try:
            policy.observe(step)  # type: ignore[attr-defined]  # callers test for Observer once
        except Exception as problem:  # a plugin's: it learns nothing from this step
            self.validity.note(policy, problem)

    # -- memory

    @property
    def fleet_policies(self) -> dict[str, object]:
        """The policies of which there is one for the whole fleet, by kind."""
        return {
            "prefill_placement": self._prefill_placement,
            "decode_placement": self._decode_placement,
            "admission": self._admission,
        }

    def dump_state(self, policy: object) -> bytes:
        """The memory of a policy as JSON; empty when it has none."""
        state = getattr(policy, "state", None)
        return b"" if state is None else msgspec.json.encode(state)

    def load_state(self, policy: object, state: bytes) -> None:
        """Give a policy the memory that `dump_state` wrote.

        Raises:
            msgspec.DecodeError: it is not the state of such a policy.
        """
        if state and (own := getattr(policy, "state", None)) is not None:
            policy.state = msgspec.json.decode(state, type=type(own))  # type: ignore[attr-defined]


def _view(lane: PrefillLane, now_s: float, peers: Sequence[Peer], wanted: int) -> PrefillView:
    own, shared = lane.own, lane.shared
    only_live = lane.rule.lost_last
    if shared is None or not len(shared):
        waiting = own.live if only_live else own.by_arrival
        return PrefillView(now_s, lane.instance, waiting, own.by_deadline, own.lost, wanted, peers)
    left = _left_to_peers(shared, now_s, peers)
    free, by_deadline, lost = (
        [w for w in queue if w.request_id not in left] if left else queue
        for queue in (shared.live if only_live else shared.by_arrival, shared.by_deadline, shared.lost)
    )
    return PrefillView(
        now_s,
        lane.instance,
        merged(free, own.live if only_live else own.by_arrival, arrival_key),
        merged(by_deadline, own.by_deadline, deadline_key),
        merged(lost, own.lost, arrival_key),
        wanted,
        peers,
    )


def _left_to_peers(shared: WaitingQueue, now_s: float, peers: Sequence[Peer]) -> Set[RequestId]:
    """Requests that a peer with a larger prefix hit would have to wait for no longer than that hit saves."""
    left: set[RequestId] = set()
    for peer in peers:
        if peer.saved_s is not None:
            wait_s = max(peer.free_at_s - now_s, 0.0)
            left.update(w.request_id for w in shared.by_arrival if (s := peer.saved_s(w)) > 0.0 and s >= wait_s)
    return left


def _fill_step(chosen: list[Waiting], instance: PrefillInstance, reason: Reason) -> PrefillDecision:
    """Whole remainders in order while the token budget lasts; the last one is split."""
    budget = instance.chunk_tokens
    if budget is None:
        return PrefillDecision(chosen, [Part(w.remaining_tokens, w.context_tokens) for w in chosen], reason)
    requests, parts = [], []
    for request in chosen:
        if budget <= 0:
            break
        tokens = min(request.remaining_tokens, budget)
        requests.append(request)
        parts.append(Part(tokens, request.context_tokens))
        budget -= tokens
    return PrefillDecision(requests, parts, reason)


def _everyone_who_fits(view: DecodeView) -> DecodePlan:
    admit: list[RequestId] = []
    batch_size, sum_context = len(view.residents), view.sum_context_tokens
    for request in view.ready:
        if batch_size >= view.instance.batch_limit or not view.fits(request, batch_size, sum_context):
            break
        admit.append(request.request_id)
        batch_size += 1
        sum_context += request.context_tokens
    return DecodePlan(admit)


def decode_view(
    now_s: float, instance: DecodeInstance, residents: Sequence[Resident], ready: Sequence[Resident]
) -> DecodeView:
    """A decode view with its sums worked out, for callers that do not keep them."""
    return DecodeView(
        now_s,
        instance,
        residents,
        ready,
        sum(r.context_tokens for r in residents),
        min((r.tpot_target_s for r in residents), default=NO_TARGET_S),
    )
