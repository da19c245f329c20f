"""Prefill (or mixed) instances that serve the same models, and the requests that wait for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.instances import AHEAD_S, LiveInstance, PrefillSide
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import Waiting
from kairos.scheduler_core.policy import Peer, PrefillLoad
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.slo import ttft_deadline_s

Views = Mapping[str, Waiting]
"""A request as each instance sees it, by instance id."""


class Pool:
    """Instances that may take the same requests.

    Args:
        serves: models that can be served from the prompt to the last token.
        engine: theirs.
        decider: decides about their requests.
        part: of the fleet that they belong to; 0 where it is not divided.
    """

    def __init__(self, serves: frozenset[str], mixed: bool, engine: str, decider: Decider, part: int) -> None:
        self.serves = serves
        self.mixed = mixed
        self.engine = engine
        self.decider = decider
        self.part = part
        self._shares_queue = decider.strategy.prefill_placement.name == "late"
        """Whether requests wait unbound as a rule."""
        self.instances: list[LiveInstance] = []
        self.sides: list[PrefillSide] = []
        """The same instances, as what computes prompts."""
        self.shared: dict[object, WaitingQueue] = {}
        """The unbound requests, as each group of instances that predict alike sees them."""
        self.knows_prefixes = False
        """Instances differ in the prefixes that they have."""
        self._alike: tuple[str, ...] = ()
        """The ids of all instances where they predict alike."""
        self.waiting_s = 0.0
        """Predicted prefill seconds of all that waits."""

    def open(self, kept: Set[str]) -> None:
        """Give every instance its lane; those in `kept` go on with the guard and the policy that they have."""
        decider = self.decider
        self.sides = sides = [side_of(instance) for instance in self.instances]
        self.knows_prefixes = len(sides) > 1 and any(side.knows_prefixes for side in sides)
        known = [side.lane for side in sides if side.instance.instance_id in kept]
        shared_rule = known[0].rule if known else decider.prefill_rule()
        for side in sides:
            own_cache = side.instance.instance_id if side.knows_prefixes else None
            side.group = (id(side.instance.step_times), side.instance.chunk_tokens, own_cache)
            queue = self.shared.setdefault(side.group, WaitingQueue()) if len(sides) > 1 else None
            old = side.lane if side.instance.instance_id in kept else None
            own_rule = decider.prefill_rule() if old is None else old.rule
            rule = shared_rule if self._shares_queue else own_rule
            side.lane = decider.prefill_lane(side.instance, rule, queue)
            if old is not None:
                side.lane.guard = old.guard
        if len({side.group for side in sides}) == 1:
            self._alike = tuple(side.instance.instance_id for side in sides)

    # -- who waits

    def waiting_requests(self) -> int:
        """How many wait, bound or not."""
        shared = next(iter(self.shared.values()), ())
        return len(shared) + sum(len(side.lane.own) for side in self.sides)

    def views(self, call: Call) -> Views:
        """A request as each instance sees it."""
        if self._alike:
            return dict.fromkeys(self._alike, waiting_of(call, self.sides[0]))
        by_group: dict[object, Waiting] = {}
        views: dict[str, Waiting] = {}
        for side in self.sides:
            if side.group not in by_group:
                by_group[side.group] = waiting_of(call, side)
            views[side.instance.instance_id] = by_group[side.group]
        return views

    def add(self, views: Views, place: str | None, now_s: float) -> None:
        """Let a request wait: at the instance it was placed on, or unbound."""
        first = next(iter(views.values()))
        self.waiting_s += first.prefill_s
        for side in self.sides:
            if len(self.sides) == 1 or side.instance.instance_id == place:
                side.lane.own.add(views[side.instance.instance_id], now_s)
                return
        for side in self.sides:
            queue = self.shared[side.group]
            if first.request_id not in queue:
                queue.add(views[side.instance.instance_id], now_s)

    def take(self, number: int, started: bool) -> None:
        """Take a request out of every queue: it starts, or it left."""
        queues: Iterable[WaitingQueue] = (
            *(side.lane.own for side in self.sides),
            *self.shared.values(),
        )
        seconds = 0.0
        for queue in queues:
            if number in queue:
                request = queue.remove(number)
                seconds = request.prefill_s
                if started:
                    queue.note_started(request)
        self.waiting_s = max(0.0, self.waiting_s - seconds)

    def at_once(self, place: str | None, now_s: float) -> LiveInstance | None:
        """The instance that takes a request which arrives while nothing waits; None where that is to be decided.

        Unbound, it may be left to a peer that has its prefix.
        """
        if place is None and self.knows_prefixes:
            return None
        found, free_at_s = None, float("inf")
        for instance, side in zip(self.instances, self.sides, strict=True):
            if side.free_at_s < free_at_s and place in (None, instance.instance_id) and side.has_room(now_s):
                found, free_at_s = instance, side.free_at_s
        return found

    def able(self, now_s: float, asked: Set[str] = frozenset()) -> LiveInstance | None:
        """The instance that is free first, of those that have room and something to choose from and are not `asked`."""
        found, free_at_s = None, float("inf")
        for instance, side in zip(self.instances, self.sides, strict=True):
            first = side.free_at_s < free_at_s and instance.instance_id not in asked
            if first and side.lane.waits() and side.has_room(now_s):
                found, free_at_s = instance, side.free_at_s
        return found

    def next_room_s(self, now_s: float) -> float:
        """When an instance will have room that has none yet, as predicted; inf where only an answer can tell."""
        return min(
            (
                side.free_at_s - AHEAD_S
                for side in self.sides
                if side.lane.waits() and len(side.flights) < side.limit and not side.has_room(now_s)
            ),
            default=float("inf"),
        )

    # -- what policies are shown

    def loads(self, views: Views, now_s: float) -> list[PrefillLoad]:
        """The instances, for the placement of an arriving request."""
        loads = []
        for side in self.sides:
            request, own = views[side.instance.instance_id], side.lane.own.by_arrival
            loads.append(
                PrefillLoad(
                    side.instance,
                    len(own) + len(side.flights),
                    sum(w.remaining_tokens for w in own) + side.sum_tokens,
                    sum(w.prefill_s for w in own) + max(side.free_at_s - now_s, 0.0),
                    request.prefill_s,
                    request.cached_tokens,
                )
            )
        return loads

    def peers(self, asking: PrefillSide, now_s: float) -> Sequence[Peer]:
        """The other instances, as the asking one sees them."""
        if len(self.sides) == 1 or not len(self.shared[asking.group]):
            return ()
        peers = []
        for side in self.sides:
            if side is not asking:
                free_at_s = now_s if side.has_room(now_s) else max(side.free_at_s, now_s)
                seconds = None if side.group == asking.group else self._seconds_on(side)
                saved = self._saved_on(side, asking) if side.knows_prefixes else None
                peers.append(Peer(side.instance.instance_id, free_at_s, side.lane.own.by_deadline, seconds, saved))
        return peers

    def _seconds_on(self, side: PrefillSide) -> Callable[[Waiting], float]:
        queue = self.shared[side.group]

        def prefill_s(w: Waiting) -> float:
            there = queue.get(w.request_id)
            return w.prefill_s if there is None else there.prefill_s

        return prefill_s

    def _saved_on(self, side: PrefillSide, asking: PrefillSide) -> Callable[[Waiting], float]:
        queue, here = self.shared[side.group], asking.instance

        def saved_s(w: Waiting) -> float:
            there = queue.get(w.request_id)
            if there is None or there.cached_tokens <= w.cached_tokens:
                return 0.0
            seconds, chunk = here.step_times.remaining_prefill_s, here.chunk_tokens
            return w.prefill_s - seconds(w.prompt_tokens - there.cached_tokens, there.cached_tokens, chunk)

        return saved_s

    def predicted_ttft_s(self, views: Views, now_s: float) -> float:
        """TTFT of an arriving request behind what the policy puts before it, on its best instance."""
        best_s = float("inf")
        for side in self.sides:
            lane, request = side.lane, views[side.instance.instance_id]
            lane.own.add(request, now_s)
            order = self.decider.prefill_order(lane, now_s, self.peers(side, now_s))
            lane.own.remove(request.request_id)
            servers = len(self.sides) if self._shares_queue else 1
            ahead_s = 0.0
            for w in order:
                if w.request_id == request.request_id:
                    break
                ahead_s += w.prefill_s / servers
            best_s = min(best_s, max(side.free_at_s - now_s, 0.0) + ahead_s + request.prefill_s)
        return best_s

    def roughly_s(self, views: Views, now_s: float) -> float:
        """TTFT of an arriving request in arrival order: all that waits shared by the instances, then its own work."""
        soonest_s = min([side.free_at_s for side in self.sides])
        own_s = min([view.prefill_s for view in views.values()])
        return max(soonest_s - now_s, 0.0) + self.waiting_s / len(self.sides) + own_s


def side_of(instance: LiveInstance) -> PrefillSide:
    """The side of an instance of a pool that computes prompts."""
    assert instance.prefill is not None
    return instance.prefill


def waiting_of(call: Call, side: PrefillSide) -> Waiting:
    """A request as an instance sees it."""
    cached = side.cached_tokens(call) if side.knows_prefixes else 0
    instance = side.instance
    prefill_s = instance.step_times.remaining_prefill_s(call.prompt_tokens - cached, cached, instance.chunk_tokens)
    return Waiting(
        call.number,
        call.arrival_s,
        call.prompt_tokens,
        call.ttft_target_s,
        ttft_deadline_s(call.arrival_s, call.ttft_target_s),
        prefill_s,
        prefill_s,
        cached,
        0,
        call.slo_class,
        call.tenant,
    )
