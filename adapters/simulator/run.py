"""One run of a strategy on a simulated fleet, on a virtual clock: the rules of docs/simulator.md.

At one instant: step ends (prefill, then decode, by index), KV that is ready (by id), arrivals (by id), then idle
prefill instances decide, then idle decode instances. The same `Decider` decides here as in a live system.
"""

import heapq
import math
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from kairos.adapters.simulator.decode import DecodeRun
from kairos.adapters.simulator.evidence import Gaps
from kairos.adapters.simulator.fleet import SimulatedFleet
from kairos.adapters.simulator.noise import PredictedStepTimes, StepNoise, request_factors
from kairos.adapters.simulator.outcome import FINISHED, REJECTED, Outcome
from kairos.adapters.simulator.prefill import Pool, PrefillRun, pools_of
from kairos.adapters.simulator.tables import RequestTable, Workload
from kairos.scheduler_core import slo
from kairos.scheduler_core.decider import Decider
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Resident, Waiting
from kairos.scheduler_core.policy import AdmissionView, DecodeLoad, DecodePlacementView, PrefillPlacementView
from kairos.scheduler_core.strategy import Strategy, not_applied

Stages = Literal["all", "prefill"]

_PREFILL_END, _DECODE_END, _KV_READY = range(3)


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a run may vary beside workload, fleet and strategy.

    `noise` and `predictor_error` are the sigmas of lognormal factors with median 1: on what steps really take, and on
    what policies are told.
    """

    seed: int = 0
    noise: float = 0.0
    predictor_error: float = 0.0
    deferred_share: float = 0.05
    stages: Stages = "all"
    keep_steps: bool = False
    """Keep the decode steps too, for steps.csv and events.parquet."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step as it is logged; contexts before the step, `request_ids` are rows of the workload."""

    kind: Literal["prefill", "decode"]
    instance: int
    start_s: float
    end_s: float
    request_ids: Sequence[int]
    tokens: Sequence[int]
    """New tokens of each request in it."""
    sum_context_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """What a run leaves behind."""

    requests: RequestTable
    steps: Sequence[StepRow]
    """Prefill steps; with `keep_steps` decode steps too."""
    decision_us: slo.FloatArray
    """Wall microseconds of each decision (n_decisions,)."""
    kv_transfer_start_s: slo.FloatArray
    """(n,), NaN where no KV was moved."""
    gaps: Gaps
    """Every gap between two tokens of a request."""
    fallbacks: Mapping[str, int]
    """Decisions in which a policy was replaced, by policy and error."""
    notes: Sequence[str]
    """Counted, named treatments and what the fleet's `control` does not apply."""


def simulate(
    workload: Workload,
    fleet: SimulatedFleet,
    strategy: Strategy,
    knobs: Knobs = Knobs(),
    switches: Iterable[tuple[float, Strategy]] = (),
) -> Run:
    """Run a strategy on a workload until every request has ended. Deterministic in `knobs.seed`.

    Args:
        workload, fleet, strategy, knobs: what is run.
        switches: (second, strategy) ascending: what decides from then on, instead of the one before.

    Raises:
        UnknownPolicyError, ConfigError: a strategy cannot be built.
    """
    simulation = Simulation(workload, fleet, strategy, knobs)
    for at_s, next_strategy in switches:
        simulation.advance(at_s)
        simulation.switch(next_strategy, at_s)
    simulation.advance(math.inf)
    return simulation.result()


class Simulation:
    """A run that can be stopped at any second, looked at in `outcome`, and given another strategy."""

    def __init__(self, workload: Workload, fleet: SimulatedFleet, strategy: Strategy, knobs: Knobs) -> None:
        self.workload, self.fleet, self.knobs = workload, fleet, knobs
        self.decider = Decider(strategy, knobs.deferred_share)
        self.outcome = Outcome.of(workload)
        self.events: list[tuple[float, int, int, object]] = []
        self.steps: list[StepRow] = []
        self.decision_us = array("d")
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.prompt_tokens: list[int] = workload.prompt_tokens.tolist()
        self.ttft_target_s: list[float] = workload.ttft_target_s.tolist()
        self.tpot_target_s: list[float] = workload.tpot_target_s.tolist()
        self.noise = request_factors(knobs.seed, "prefill noise", knobs.noise, len(workload))
        self.errors = request_factors(knobs.seed, "prefill error", knobs.predictor_error, len(workload))
        self.first_token_at_decode = fleet.handover.first_token == "decode"
        self.place_decode_at = fleet.handover.place_decode
        self.link_free_s = [0.0] * len(fleet.prefill)
        self.kv_transfer_start_s = [float("nan")] * len(workload)
        self.pools: list[Pool] = pools_of(fleet.prefill, self.decider, workload)
        self.prefill: list[PrefillRun] = sorted(
            (run for pool in self.pools for run in pool.runs), key=lambda r: r.index
        )
        self.decode: list[DecodeRun] = (
            [] if knobs.stages == "prefill" else [self._decode_run(n) for n in range(len(fleet.decode))]
        )
        self.prefill_stirred = False
        self.decode_stirred: set[int] = set()
        self.no_server = 0
        self.submitted = 0
        """Rows before this one have arrived."""

    def _decode_run(self, index: int) -> DecodeRun:
        unit, knobs = self.fleet.decode[index], self.knobs
        times = unit.instance.step_times
        told = None
        instance = unit.instance
        if knobs.predictor_error:
            told = PredictedStepTimes(times, StepNoise(knobs.seed, "decode error", index, knobs.predictor_error))
            instance = msgspec.structs.replace(instance, step_times=told)
        noise = StepNoise(knobs.seed, "decode noise", index, knobs.noise)
        return DecodeRun(index, instance, times, unit, self.decider, noise, self.outcome, told)

    def advance(self, until_s: float) -> None:
        """Go through all instants before `until_s`."""
        events, arrivals = self.events, self.arrival_s
        next_arrival, requests = self.submitted, len(arrivals)
        while True:
            now_s = events[0][0] if events else math.inf
            if next_arrival < requests and arrivals[next_arrival] < now_s:
                now_s = arrivals[next_arrival]
            if now_s >= until_s:
                break
            while events and events[0][0] == now_s:
                _, kind, index, payload = heapq.heappop(events)
                if kind == _DECODE_END:
                    self.decode_ends(index, now_s)
                elif kind == _PREFILL_END:
                    self.prefill_ends(index, now_s)
                else:
                    self.kv_ready(index, payload, now_s)
            while next_arrival < requests and arrivals[next_arrival] == now_s:
                self.arrives(next_arrival, now_s)
                next_arrival += 1
            if self.prefill_stirred:
                self.prefill_instances_start(now_s)
            if self.decode_stirred:
                for number in sorted(self.decode_stirred):
                    self.decode_starts(self.decode[number], now_s)
                self.decode_stirred.clear()
                if self.prefill_stirred:  # decode took KV that kept a prefill instance waiting
                    self.prefill_instances_start(now_s)
        self.submitted = next_arrival

    def switch(self, strategy: Strategy, now_s: float) -> None:
        """Let another strategy decide from now on, over all that waits, with its true arrival times.

        Running steps and begun prompts go on, requests keep their decode instance, guards keep what they owe. Those not
        begun are placed anew, in arrival order, where the placement is another. The strategy that decides already keeps
        its memory.

        Raises:
            UnknownPolicyError, ConfigError: the strategy cannot be built; the old one goes on.
        """
        if strategy == self.decider.strategy:
            return
        before, self.decider = self.decider, Decider(strategy, self.knobs.deferred_share)
        self.decider.validity.fallbacks = before.validity.fallbacks
        for run in self.decode:
            run.use(self.decider)
        for pool in self.pools:
            pool.use(self.decider)
            if strategy.prefill_placement != before.strategy.prefill_placement:
                for row in pool.take_unbegun():
                    self.wait(pool, pool.views(row, lambda run: self.waiting(row, run)), now_s)  # noqa: B023  # called at once
        self.prefill_instances_start(now_s)

    # -- what happens

    def arrives(self, row: int, now_s: float) -> None:
        """A request arrives: admission, then placement."""
        model = self.workload.model[row]
        pool = min(
            (pool for pool in self.pools if not model or model in pool.serves),
            key=lambda pool: pool.waiting_requests() / len(pool.runs),
            default=None,
        )
        decodes = any(not model or model in unit.serves for unit in self.fleet.decode)
        if pool is None or (self.decode and not decodes):
            self.no_server += 1
            self.outcome.status[row] = REJECTED
            return
        views = pool.views(row, lambda run: self.waiting(row, run))
        if not self.decider.accepts_all and not self.admitted(row, pool, views, now_s):
            return
        self.outcome.predicted_prefill_s[row] = next(iter(views.values())).total_prefill_s
        self.wait(pool, views, now_s)

    def wait(self, pool: Pool, views: Mapping[int, Waiting], now_s: float) -> None:
        """Let a request wait where the placement policy says."""
        first = next(iter(views.values()))
        place = None
        if len(pool.runs) > 1:
            started_ns = time.perf_counter_ns()
            place = self.decider.place_prefill(
                PrefillPlacementView(now_s, first, [run.load(views[run.index], now_s) for run in pool.runs])
            )
            self.decision_us.append((time.perf_counter_ns() - started_ns) / 1e3)
        pool.add(views, place, now_s)
        self.prefill_stirred = True

    def admitted(self, row: int, pool: Pool, views: Mapping[int, Waiting], now_s: float) -> bool:
        """Ask the admission policy; note a rejection."""
        predicted_ttft_s = (
            pool.predicted_ttft_s(self.decider, views, now_s) if self.decider.needs_prediction else float("nan")
        )
        answer = self.decider.admit(
            AdmissionView(now_s, next(iter(views.values())), predicted_ttft_s, pool.waiting_requests())
        )
        if not answer.accept:
            self.outcome.status[row] = REJECTED
        return answer.accept

    def waiting(self, row: int, run: PrefillRun) -> Waiting:
        """A fresh request as one instance sees it."""
        prompt = self.prompt_tokens[row]
        cached = run.hit_tokens(row, prompt)
        instance = run.unit.instance
        work_s = self.errors[row] * instance.step_times.remaining_prefill_s(
            prompt - cached, cached, instance.chunk_tokens
        )
        arrival_s, target_s = self.arrival_s[row], self.ttft_target_s[row]
        return Waiting(
            row,
            arrival_s,
            prompt,
            target_s,
            slo.ttft_deadline_s(arrival_s, target_s),
            work_s,
            work_s,
            cached,
            0,
            self.workload.slo_class[row],
            self.workload.tenant[row],
        )

    def prefill_instances_start(self, now_s: float) -> None:
        """All idle prefill instances decide, by index."""
        self.prefill_stirred = False
        for prefill in self.prefill:
            if not prefill.busy and prefill.lane.waits():
                self.prefill_starts(prefill, now_s)

    def prefill_starts(self, run: PrefillRun, now_s: float) -> None:
        """An idle prefill instance decides and begins a step."""
        if run.holds_too_much():
            return
        peers = run.pool.peers(run, now_s)
        started_ns = time.perf_counter_ns()
        decision = self.decider.next_prefill(run.lane, now_s, peers)
        self.decision_us.append((time.perf_counter_ns() - started_ns) / 1e3)
        if decision is None:
            return
        decision = run.with_fresh_hits(decision, self.errors)
        noise = None if not self.knobs.noise else [self.noise[w.request_id] for w in decision.requests]  # type: ignore[index]  # rows
        seconds = run.unit.instance.step_times.prefill_step_s(decision.parts, noise)
        predicted_s = seconds
        if self.knobs.noise or self.knobs.predictor_error:
            errors = [self.errors[w.request_id] for w in decision.requests]  # type: ignore[index]  # rows
            predicted_s = run.unit.instance.step_times.prefill_step_s(decision.parts, errors)
        outcome = self.outcome
        for request in decision.requests:
            row: int = request.request_id  # type: ignore[assignment]  # rows
            if outcome.prefill_instance[row] < 0:
                outcome.prefill_instance[row] = run.index
                outcome.prefill_start_s[row] = now_s
                outcome.cached_tokens[row] = request.cached_tokens
                outcome.actual_prefill_s[row] = self.noise[row] * request.total_prefill_s / self.errors[row]
                if self.place_decode_at == "at_dispatch" and self.decode:
                    self.choose_decode(row, now_s)
        run.begin(decision, now_s, now_s + predicted_s, self.decider, self.errors)
        self.steps.append(
            StepRow(
                "prefill",
                run.index,
                now_s,
                now_s + seconds,
                decision.request_ids,  # type: ignore[arg-type]  # rows
                [part.new_tokens for part in decision.parts],
                sum(part.context_tokens for part in decision.parts),
            )
        )
        heapq.heappush(self.events, (now_s + seconds, _PREFILL_END, run.index, None))

    def prefill_ends(self, index: int, now_s: float) -> None:
        """A prefill step ends: completed prompts emit their first token and hand over their KV."""
        run = self.prefill[index]
        self.prefill_stirred = True
        for row in run.end(now_s, self.decider):
            outcome = self.outcome
            if not self.decode:  # prefill alone: the run ends with the first token
                outcome.first_token_s[row] = now_s
                outcome.status[row] = FINISHED
                continue
            if not self.first_token_at_decode:
                outcome.first_token_s[row] = now_s
                if outcome.output_tokens[row] <= 1:
                    outcome.last_token_s[row] = now_s
                    outcome.status[row] = FINISHED
                    continue
            run.held_tokens += self.prompt_tokens[row]
            if self.place_decode_at == "at_first_token":
                self.choose_decode(row, now_s)
            link = self.fleet.kv_transfer
            start_s = max(now_s, self.link_free_s[index]) if link.contention else now_s
            self.kv_transfer_start_s[row] = start_s
            bytes_s = self.prompt_tokens[row] * link.bytes_per_token / link.bytes_per_s
            self.link_free_s[index] = start_s + bytes_s
            ready_s = start_s + link.latency_s + bytes_s
            heapq.heappush(self.events, (ready_s, _KV_READY, row, run))

    def choose_decode(self, row: int, now_s: float) -> None:
        """Bind a request to a decode instance before its KV is there: it counts as load from now on."""
        run = self.place(self.resident(row, now_s), now_s)
        self.outcome.decode_instance[row] = run.index
        run.expect(row, self.prompt_tokens[row])

    def resident(self, row: int, now_s: float) -> Resident:
        """A request as decode sees it, its KV just there."""
        target_s = self.tpot_target_s[row]
        if self.first_token_at_decode:
            emitted, first_s = 0, now_s
            due_s = slo.ttft_deadline_s(self.arrival_s[row], self.ttft_target_s[row])
        else:
            emitted, first_s = 1, self.outcome.first_token_s[row]
            due_s = slo.token_deadline_s(first_s, target_s, 1)
        return Resident(
            row,
            self.prompt_tokens[row] + 1,
            emitted,
            first_s,
            due_s,
            target_s,
            now_s,
            first_s,
            self.workload.slo_class[row],
            self.workload.tenant[row],
        )

    def place(self, resident: Resident, now_s: float) -> DecodeRun:
        """The decode instance that the placement policy chooses."""
        model = self.workload.model[resident.request_id]  # type: ignore[index]  # rows
        runs = [run for run in self.decode if not model or model in run.unit.serves]
        if len(runs) == 1:
            return runs[0]
        loads: list[DecodeLoad] = [run.load() for run in runs]
        started_ns = time.perf_counter_ns()
        place = self.decider.place_decode(DecodePlacementView(now_s, resident, loads))
        self.decision_us.append((time.perf_counter_ns() - started_ns) / 1e3)
        return next(run for run in runs if run.instance.instance_id == place)

    def kv_ready(self, row: int, prefill: object, now_s: float) -> None:
        """The KV of a request is at its decode instance."""
        outcome = self.outcome
        resident = self.resident(row, now_s)
        if outcome.decode_instance[row] < 0:
            run = self.place(resident, now_s)
            outcome.decode_instance[row] = run.index
        else:
            run = self.decode[outcome.decode_instance[row]]
            run.arrived(row)
        outcome.decode_ready_s[row] = now_s
        run.make_ready(resident)
        self.decode_stirred.add(run.index)
        assert isinstance(prefill, PrefillRun)
        run.holders[row] = prefill

    def decode_starts(self, run: DecodeRun, now_s: float) -> None:
        """An idle decode instance decides and begins a step."""
        if run.busy or not (run.residents or run.ready):
            return
        started_ns = time.perf_counter_ns()
        released = run.decide(now_s)
        self.decision_us.append((time.perf_counter_ns() - started_ns) / 1e3)
        for row in released:
            prefill = run.holders.pop(row, None)
            if prefill is not None:
                prefill.held_tokens -= self.prompt_tokens[row]
                if prefill.unit.kv_held_tokens < UNLIMITED_TOKENS:
                    self.prefill_stirred = True
        end_s = run.begin(now_s)
        heapq.heappush(self.events, (end_s, _DECODE_END, run.index, None))

    def decode_ends(self, index: int, now_s: float) -> None:
        """A decode step ends: each participant emits one token."""
        run = self.decode[index]
        if self.knobs.keep_steps:
            ids = [r.request_id for r in run.members]
            self.steps.append(
                StepRow("decode", index, run.started_s, now_s, ids, [1] * len(ids), run.member_context)  # type: ignore[arg-type]  # rows
            )
        run.end(now_s)
        self.decode_stirred.add(index)

    # -- the result

    def result(self) -> Run:
        """Everything as arrays."""
        return Run(
            requests=table_of(self.workload, self.outcome, self.knobs.stages),
            steps=self.steps,
            decision_us=np.array(self.decision_us),
            kv_transfer_start_s=np.array(self.kv_transfer_start_s),
            gaps=Gaps(np.array(self.outcome.itl_row, dtype=np.int64), np.array(self.outcome.itl_s)),
            fallbacks=dict(self.decider.validity.fallbacks),
            notes=self.notes(),
        )

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        notes = list(self.workload.notes)
        if self.no_server:
            notes.append(f"{self.no_server} requests rejected: no_instance_serves_model")
        capacities = [unit.instance.kv_tokens for unit in self.fleet.decode]
        if capacities and self.decode:
            ends = self.workload.prompt_tokens + self.workload.output_tokens
            if oversized := int(np.sum(ends > max(capacities))):
                notes.append(
                    f"{oversized} requests are longer than any decode instance's KV capacity; "
                    "each runs alone on an empty instance"
                )
        notes.extend(
            not_applied(
                self.decider.strategy,
                [unit.instance.control for unit in self.fleet.prefill],
                [unit.instance.control for unit in self.fleet.decode],
            )
        )
        return notes


def table_of(workload: Workload, outcome: Outcome, stages: Stages) -> RequestTable:
    """The columns of a run, and what was met in it."""
    first_token_s = np.array(outcome.first_token_s)
    last_token_s = np.array(outcome.last_token_s)
    status = np.array(outcome.status, dtype=np.int8)
    finished = status == FINISHED
    outputs = workload.output_tokens.astype(np.float64)
    ttft = first_token_s - workload.arrival_s
    several = (outputs > 1) & finished & (stages == "all")
    tpot = np.full(len(workload), np.nan)
    tpot[several] = slo.tpot_s(first_token_s[several], last_token_s[several], outputs[several])
    ttft_met = slo.ttft_met(ttft, workload.ttft_target_s)
    tpot_met = finished if stages == "prefill" else slo.tpot_met(tpot, workload.tpot_target_s, outputs, finished)
    return RequestTable(
        workload=workload,
        cached_tokens=np.array(outcome.cached_tokens, dtype=np.int64),
        prefill_instance=np.array(outcome.prefill_instance, dtype=np.int64),
        decode_instance=np.array(outcome.decode_instance, dtype=np.int64),
        prefill_start_s=np.array(outcome.prefill_start_s),
        first_token_s=first_token_s,
        decode_ready_s=np.array(outcome.decode_ready_s),
        last_token_s=last_token_s,
        max_itl_s=np.array(outcome.max_itl_s),
        tokens_in_time=np.array(outcome.tokens_in_time, dtype=np.int64),
        status=status,
        predicted_prefill_s=np.array(outcome.predicted_prefill_s),
        actual_prefill_s=np.array(outcome.actual_prefill_s),
        ttft_s=ttft,
        tpot_s=tpot,
        ttft_met=ttft_met,
        tpot_met=tpot_met,
        slo_met=ttft_met & tpot_met & finished,
    )
