"""Prefill instances of the simulator, and the pools of them that serve the same models."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from kairos.adapters.simulator.fleet import PrefillUnit
from kairos.adapters.simulator.tables import Workload
from kairos.scheduler_core.decider import Decider, PrefillLane
from kairos.scheduler_core.decision import PrefillDecision
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Part, Waiting
from kairos.scheduler_core.policy import Peer, PrefillLoad
from kairos.scheduler_core.prefix_cache import PrefixCache
from kairos.scheduler_core.queue import WaitingQueue, arrival_key
from kairos.scheduler_core.strategy import PrefillRule


class PrefillRun:
    """One prefill instance at work."""

    def __init__(self, index: int, unit: PrefillUnit, pool: "Pool", workload: Workload) -> None:
        self.index = index
        self.unit = unit
        self.pool = pool
        self.lane: PrefillLane
        self.busy = False
        self.free_at_s = 0.0
        """Predicted end of the running step."""
        self.held_tokens = 0
        """KV of computed prompts that decode has not taken yet."""
        self._block_ids = workload.block_ids
        cached = unit.cache_tokens > 0 and workload.block_ids is not None
        self.cache = PrefixCache(unit.cache_tokens, workload.block_tokens) if cached else None
        self._started_s = 0.0
        self._new_tokens = 0
        self._completed: list[int] = []
        self._unfinished: list[Waiting] = []

    @property
    def group(self) -> object:
        """Instances of one group predict the same seconds for a request."""
        instance = self.unit.instance
        return (id(instance.step_times), instance.chunk_tokens, None if self.cache is None else self.index)

    def hit_tokens(self, row: int, prompt_tokens: int) -> int:
        """Tokens of a prompt that its prefix cache holds now."""
        if self.cache is None or self._block_ids is None:
            return 0
        return self.cache.hit_tokens(self._block_ids[row], prompt_tokens)

    def holds_too_much(self) -> bool:
        """Whether it must wait for decode to take KV before it computes more."""
        return self.held_tokens >= self.unit.kv_held_tokens

    def load(self, request: Waiting, now_s: float) -> PrefillLoad:
        """Its load, for the placement of an arriving request."""
        own = self.lane.own.by_arrival
        return PrefillLoad(
            self.unit.instance,
            len(own),
            sum(w.remaining_tokens for w in own) + (self._new_tokens if self.busy else 0),
            sum(w.prefill_s for w in own) + (max(self.free_at_s - now_s, 0.0) if self.busy else 0.0),
            request.prefill_s,
            request.cached_tokens,
        )

    def with_fresh_hits(self, decision: PrefillDecision, errors: Sequence[float]) -> PrefillDecision:
        """The decision with what is cached now, which may be more or less than on arrival."""
        if self.cache is None or self._block_ids is None:
            return decision
        budget = self.unit.instance.chunk_tokens or UNLIMITED_TOKENS
        requests, parts = [], []
        for request in decision.requests:
            fresh = request if request.prefilled_tokens else self._refreshed(request, errors)
            tokens = min(fresh.remaining_tokens, budget)
            if tokens <= 0:
                break
            requests.append(fresh)
            parts.append(Part(tokens, fresh.context_tokens))
            budget -= tokens
        return PrefillDecision(requests, parts, decision.reason)

    def _refreshed(self, request: Waiting, errors: Sequence[float]) -> Waiting:
        row: int = request.request_id  # type: ignore[assignment]  # rows
        cached = self.hit_tokens(row, request.prompt_tokens)
        if cached == request.cached_tokens:
            return request
        instance = self.unit.instance
        work_s = errors[row] * instance.step_times.remaining_prefill_s(
            request.prompt_tokens - cached, cached, instance.chunk_tokens
        )
        return msgspec.structs.replace(request, cached_tokens=cached, prefill_s=work_s, total_prefill_s=work_s)

    def begin(
        self,
        decision: PrefillDecision,
        now_s: float,
        predicted_end_s: float,
        decider: Decider,
        errors: Sequence[float],
    ) -> None:
        """Start a step: what it completes leaves the queues, the rest waits here as it will be afterwards."""
        instance = self.unit.instance
        decider.prefill_started(self.lane, decision)
        self.busy = True
        self.free_at_s = predicted_end_s
        self._started_s = now_s
        self._new_tokens = sum(part.new_tokens for part in decision.parts)
        self._completed, self._unfinished = [], []
        for request, part in zip(decision.requests, decision.parts, strict=True):
            row: int = request.request_id  # type: ignore[assignment]  # rows
            self.pool.take(self, request)
            left = request.remaining_tokens - part.new_tokens
            if not left:
                self._completed.append(row)
                continue
            after = msgspec.structs.replace(
                request,
                prefilled_tokens=request.prefilled_tokens + part.new_tokens,
                prefill_s=errors[row]
                * instance.step_times.remaining_prefill_s(
                    left, request.context_tokens + part.new_tokens, instance.chunk_tokens
                ),
            )
            self.lane.own.add(after, predicted_end_s)
            self._unfinished.append(after)

    def end(self, now_s: float, decider: Decider) -> Sequence[int]:
        """End the step; the rows whose prompts are done."""
        self.busy = False
        for request in self._unfinished:
            self.lane.own.replace(request, now_s)
        if self.cache is not None and self._block_ids is not None:
            for row in self._completed:
                self.cache.use(self._block_ids[row])
        decider.prefill_ended(self.lane, now_s - self._started_s, self._new_tokens, self._completed)
        return self._completed


class Pool:
    """Prefill instances that serve the same models, and the queue of those not bound to one, one view of it a group."""

    def __init__(self, serves: frozenset[str]) -> None:
        self.serves = serves
        self.shares_queue = False
        """Whether requests wait in the shared queue as a rule: placement `late`."""
        self.runs: list[PrefillRun] = []
        self.shared: dict[object, WaitingQueue] = {}

    def rules(self, decider: Decider) -> list[PrefillRule]:
        """A rule for each instance; those that wait in one queue share one."""
        self.shares_queue = decider.strategy.prefill_placement.name == "late"
        shared = decider.prefill_rule()
        return [shared if self.shares_queue else decider.prefill_rule() for _ in self.runs]

    def use(self, decider: Decider) -> None:
        """Let a strategy order what waits from the next decision on."""
        for run, rule in zip(self.runs, self.rules(decider), strict=True):
            run.lane.use(rule)

    def take_unbegun(self) -> list[int]:
        """Take every request out whose prompt is not begun; their rows, in arrival order."""
        queues = (*self.shared.values(), *(run.lane.own for run in self.runs))
        unbegun = {w.request_id: w for queue in queues for w in queue.by_arrival if not w.prefilled_tokens}
        for queue in queues:
            for request_id in unbegun.keys() & {w.request_id for w in queue.by_arrival}:
                queue.remove(request_id)
        return [w.request_id for w in sorted(unbegun.values(), key=arrival_key)]  # type: ignore[misc]  # rows

    def waiting_requests(self) -> int:
        """How many wait, bound or not."""
        shared = next(iter(self.shared.values()), ())
        return len(shared) + sum(len(run.lane.own) for run in self.runs)

    def views(self, row: int, make: Callable[[PrefillRun], Waiting]) -> dict[int, Waiting]:
        """An arriving request as each instance sees it, by instance index."""
        by_group: dict[object, Waiting] = {}
        views: dict[int, Waiting] = {}
        for run in self.runs:
            group = run.group
            if group not in by_group:
                by_group[group] = make(run)
            views[run.index] = by_group[group]
        return views

    def add(self, views: Mapping[int, Waiting], place: str | None, now_s: float) -> None:
        """Let a request wait: at the instance it was placed on, or in the shared queue."""
        for run in self.runs:
            if len(self.runs) == 1 or run.unit.instance.instance_id == place:
                run.lane.own.add(views[run.index], now_s)
                return
        for run in self.runs:
            queue = self.shared[run.group]
            if views[run.index].request_id not in queue:
                queue.add(views[run.index], now_s)

    def take(self, run: PrefillRun, request: Waiting) -> None:
        """Take a request out of every queue: it starts at `run`."""
        if request.request_id in run.lane.own:
            run.lane.own.remove(request.request_id)
            return
        for queue in self.shared.values():
            queue.remove(request.request_id)
            queue.note_started(request)

    def peers(self, asking: PrefillRun, now_s: float) -> Sequence[Peer]:
        """The other instances of the pool, as the asking one sees them."""
        if len(self.runs) == 1 or not len(self.shared[asking.group]):
            return ()
        return [
            Peer(
                run.unit.instance.instance_id,
                run.free_at_s if run.busy else now_s,
                run.lane.own.by_deadline,
                None if run.group == asking.group else self._seconds_on(run),
                None if run.cache is None else self._saved_on(run, asking),
            )
            for run in self.runs
            if run is not asking
        ]

    def _seconds_on(self, run: PrefillRun) -> Callable[[Waiting], float]:
        queue = self.shared[run.group]

        def prefill_s(w: Waiting) -> float:
            there = queue.get(w.request_id)
            return w.prefill_s if there is None else there.prefill_s

        return prefill_s

    def _saved_on(self, run: PrefillRun, asking: PrefillRun) -> Callable[[Waiting], float]:
        there, here = self.shared[run.group], asking.unit.instance

        def saved_s(w: Waiting) -> float:
            other = there.get(w.request_id)
            if other is None or other.cached_tokens <= w.cached_tokens:
                return 0.0
            times, chunk = here.step_times, here.chunk_tokens
            with_hit_s = times.remaining_prefill_s(w.prompt_tokens - other.cached_tokens, other.cached_tokens, chunk)
            return times.remaining_prefill_s(w.remaining_tokens, w.context_tokens, chunk) - with_hit_s

        return saved_s

    def predicted_ttft_s(self, decider: Decider, views: Mapping[int, Waiting], now_s: float) -> float:
        """TTFT of an arriving request behind the work that the active policy puts before it, on its best instance."""
        best_s = float("inf")
        for run in self.runs:
            request = views[run.index]
            run.lane.own.add(request, now_s)
            order = decider.prefill_order(run.lane, now_s, self.peers(run, now_s))
            run.lane.own.remove(request.request_id)
            servers = len(self.runs) if self.shares_queue else 1
            ahead_s = 0.0
            for w in order:
                if w.request_id == request.request_id:
                    break
                ahead_s += w.prefill_s / servers
            wait_s = max(run.free_at_s - now_s, 0.0) if run.busy else 0.0
            best_s = min(best_s, wait_s + ahead_s + request.prefill_s)
        return best_s


def pools_of(units: Sequence[PrefillUnit], decider: Decider, workload: Workload) -> list[Pool]:
    """The pools of a fleet, each instance with its lane."""
    pools: dict[frozenset[str], Pool] = {}
    for index, unit in enumerate(units):
        pool = pools.setdefault(unit.serves, Pool(unit.serves))
        pool.runs.append(PrefillRun(index, unit, pool, workload))
    for pool in pools.values():
        rules = pool.rules(decider)
        for run, rule in zip(pool.runs, rules, strict=True):
            queue = pool.shared.setdefault(run.group, WaitingQueue()) if len(pool.runs) > 1 else None
            run.lane = decider.prefill_lane(run.unit.instance, rule, queue)
    return list(pools.values())
