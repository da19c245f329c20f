"""A simulated fleet that behaves like a gateway towards the control plane: it pulls the strategy, runs, and reports.

It runs on the clock of experiments, which `service.clock_scale` makes faster than real time: hours pass in minutes. At
a slot's first instant the simulator goes on with the slot's arm, over everything that waits. It takes part in
`switchback`, and with two pools in `pools`.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import msgspec
import numpy as np

from kairos.adapters.dataplane.arms import Active, Arm, Arms, Running
from kairos.adapters.dataplane.reports import SlotReport, exceptions_among
from kairos.adapters.simulator.fleet import SimulatedFleet
from kairos.adapters.simulator.outcome import FINISHED, REJECTED, UNFINISHED
from kairos.adapters.simulator.run import Knobs, Simulation
from kairos.adapters.simulator.tables import STATUSES, IntArray, Workload
from kairos.scheduler_core.errors import ConfigError, InputError
from kairos.scheduler_core.experiment import Clock, Slot
from kairos.scheduler_core.slo import BoolArray, FloatArray
from kairos.scheduler_core.strategy import Strategy
from kairos.scheduler_core.telemetry import RequestRow

BUFFERED_BATCHES = 1_000
"""Batches of outcomes kept while the control plane is away; the oldest is dropped and counted."""
BATCH_ROWS = 2_000
TICK_S = 0.1
"""Real seconds between two pulls at least."""
PATIENCE_S = 10.0
"""Real seconds that time stands still while the control plane is away, since a block may last less than its restart."""

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()
_active = msgspec.json.Decoder(Active)


@dataclass(slots=True)
class _Pool:
    """Instances that share queues, with the requests that go to them."""

    number: int | None
    """None: the whole fleet."""
    simulation: Simulation
    sessions: Sequence[str]
    strategy: list[str]
    """What decided when each row arrived."""
    open: set[int]
    """Rows that arrived and have not ended."""
    decisions: int = 0
    failures: int = 0
    exceptions: int = 0


class SimulatedDataPlane:
    """A fleet with its traffic.

    Args:
        service: a client whose base is the control plane's address.
        workload: what arrives; its second 0 is `origin_s`.
        origin_s: on the clock of experiments.
        fleet: instances; with two pools each gets every other one.
        champion: what runs until the control plane is heard.
        key: `service.schedule_key`.
        pools: 1, or 2 for the design `pools`.
        name: this data plane's, in reports.

    Raises:
        ConfigError: the fleet cannot be divided into so many pools.
    """

    def __init__(
        self,
        service: httpx.Client,
        workload: Workload,
        origin_s: float,
        fleet: SimulatedFleet,
        champion: Strategy,
        key: bytes,
        knobs: Knobs = Knobs(),
        *,
        pools: int = 1,
        name: str = "simulated",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.arms = Arms(champion, key)
        self.origin_s, self.at_s = origin_s, origin_s
        self.dropped = 0
        """Outcomes that the control plane was away for too long to take."""
        self._service, self._name, self._patience_s = service, name, patience_s
        self._heard_at = time.monotonic()
        self._away = False
        self._batches: deque[tuple[str, int, bytes]] = deque()
        self._sent = 0
        self._reports: dict[tuple[str, float], SlotReport] = {}
        hashed = [self.arms.session_hash(str(request_id)) for request_id in workload.request_id]
        self._pools = [
            _Pool(None if pools == 1 else n, Simulation(part, half, champion, knobs), names, [""] * len(part), set())
            for n, (part, half, names) in enumerate(_divided(workload, fleet, hashed, self.arms, pools))
        ]

    def run(self, clock: Clock, until_s: float) -> None:
        """Live in real time until an instant of the clock."""
        while self.at_s < until_s:
            began = time.monotonic()
            self.tick(min(clock.now_s(), until_s))
            time.sleep(max(0.0, TICK_S - (time.monotonic() - began)))

    def tick(self, now_s: float) -> None:
        """Pull, live up to `now_s`, and tell what came of it."""
        if not self._pull(now_s) and time.monotonic() - self._heard_at < self._patience_s:
            return
        for end_s in self._instants(now_s):
            for pool in self._pools:
                self._advance(pool, end_s)
            self.at_s = end_s
        self._collect()
        self._tell()

    # -- the control plane

    def _pull(self, now_s: float) -> bool:
        """Whether the control plane answered."""
        answer = self._ask("GET", "/strategies/active")
        if answer is None:
            return False
        self._heard_at = time.monotonic()
        try:
            self.arms.pulled(_active.decode(answer), now_s)
        except (InputError, msgspec.DecodeError) as problem:
            _log.warning("the active strategy cannot be run as told: %s", problem)
        return True

    def _ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes | None:
        """The answer; None while the control plane is away or busy, which is logged once."""
        try:
            answer = self._service.request(method, path, content=body, headers=headers)
            if answer.status_code == 429 or answer.status_code >= 500:
                raise httpx.TransportError(f"answered {answer.status_code}")
        except httpx.TransportError as problem:
            if not self._away:
                _log.warning("the control plane does not answer, %s %s: %s", method, path, problem)
            self._away = True
            return None
        self._away = False
        if answer.is_error:
            raise ConfigError(f"the control plane refuses {method} {path}: {answer.text}")
        return answer.content

    def _tell(self) -> None:
        """Send outcomes, oldest first, then reports; what is not taken is sent again with the next tick."""
        while self._batches:
            batch_id, _, body = self._batches[0]
            headers = {"content-type": "application/json", "x-kairos-batch-id": batch_id}
            if self._ask("POST", "/telemetry/requests", body, headers) is None:
                return
            self._batches.popleft()
        headers = {"content-type": "application/json"}
        for (experiment, start_s), report in list(self._reports.items()):
            if self._ask("PUT", f"/experiments/{experiment}/reports/{self._name}", _encoder.encode(report), headers):
                running = self.arms.known
                slot = running.schedule.slot_at(start_s) if running else None
                if slot is None or slot.end_s <= self.at_s:
                    del self._reports[experiment, start_s]

    # -- time

    def _instants(self, now_s: float) -> Iterator[float]:
        """Where to stop on the way: every slot's beginning, the end of every burn-in, the end of trust."""
        running = self.arms.known
        marks = {now_s, self.arms.trusted_until_s}
        if running is not None:
            burn_s = running.experiment.lengths.burn_s
            marks.update(mark for slot in running.schedule.slots for mark in (slot.start_s, slot.start_s + burn_s))
        yield from sorted(mark for mark in marks if self.at_s < mark <= now_s)

    def _advance(self, pool: _Pool, end_s: float) -> None:
        """Let a pool live until `end_s` under the arm of this stretch."""
        simulation, start_s = pool.simulation, self.at_s
        arm = self.arms.of_pool(start_s, pool.number or 0)
        simulation.switch(arm.strategy, start_s - self.origin_s)
        first = simulation.submitted
        simulation.advance(end_s - self.origin_s)
        for row in range(first, simulation.submitted):
            pool.strategy[row] = arm.strategy.name
        pool.open.update(range(first, simulation.submitted))
        running = self.arms.known
        slot = running.schedule.slot_at(start_s) if running else None
        if running is not None and slot is not None:
            self._note(pool, running, slot, arm, range(first, simulation.submitted), start_s)
        pool.decisions = len(simulation.decision_us)
        pool.failures = simulation.decider.validity.fallbacks.total()
        pool.exceptions = exceptions_among(simulation.decider.validity.fallbacks)

    def _note(self, pool: _Pool, running: Running, slot: Slot, arm: Arm, rows: range, start_s: float) -> None:
        """Add a stretch of a slot to its report."""
        lengths, simulation = running.experiment.lengths, pool.simulation
        told = self._reports.setdefault((running.experiment.id, slot.start_s), SlotReport(slot.start_s))
        challenger = running.schedule.strategy_at(start_s, pool.number or 0) == running.schedule.challenger
        report = told.arm(challenger)
        counts_from_s, counts_to_s = slot.start_s + lengths.burn_s, slot.end_s - lengths.tail_s
        report.requests += sum(counts_from_s <= self.origin_s + simulation.arrival_s[row] < counts_to_s for row in rows)
        decisions_us = simulation.decision_us[pool.decisions :]
        report.decisions += len(decisions_us)
        if start_s >= counts_from_s:
            report.counted_decisions += len(decisions_us)
            report.wrong_arm += len(decisions_us) if arm.challenger != challenger else 0
        report.exceptions += exceptions_among(simulation.decider.validity.fallbacks) - pool.exceptions
        report.fallbacks += simulation.decider.validity.fallbacks.total() - pool.failures
        if len(decisions_us):
            report.decision_p99_us = max(report.decision_p99_us, float(np.quantile(decisions_us, 0.99)))
        report.worst_wait_s = max(report.worst_wait_s, self._worst_wait_s(simulation, slot))

    def _worst_wait_s(self, simulation: Simulation, slot: Slot) -> float:
        """Of the requests that arrived in a slot so far, those that still wait included."""
        low = int(np.searchsorted(simulation.workload.arrival_s, slot.start_s - self.origin_s))
        begun_s = np.array(simulation.outcome.prefill_start_s[low : simulation.submitted])
        now_s = self.at_s - self.origin_s
        waited_s = np.where(np.isnan(begun_s), now_s, begun_s) - simulation.arrival_s[low : simulation.submitted]
        rejected = np.array(simulation.outcome.status[low : simulation.submitted]) == REJECTED
        return float(np.max(waited_s, where=~rejected, initial=0.0))

    # -- outcomes

    def _collect(self) -> None:
        """Put what ended since into batches."""
        rows: list[RequestRow] = []
        for pool in self._pools:
            ended = sorted(row for row in pool.open if pool.simulation.outcome.status[row] != UNFINISHED)
            pool.open.difference_update(ended)
            rows += self._rows(pool, ended)
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            self._sent += 1
            batch_id = f"{self._name}-{self.origin_s:.3f}-{self._sent}"
            self._batches.append((batch_id, len(batch), _encoder.encode(batch)))
            if len(self._batches) > BUFFERED_BATCHES:
                self.dropped += self._batches.popleft()[1]

    def _rows(self, pool: _Pool, rows: Sequence[int]) -> list[RequestRow]:
        workload, outcome = pool.simulation.workload, pool.simulation.outcome
        met = _as_met(pool.simulation, rows)
        told = []
        for place, row in enumerate(rows):
            finished = outcome.status[row] == FINISHED
            arrival_s, first_s, outputs = (
                pool.simulation.arrival_s[row],
                outcome.first_token_s[row],
                outcome.output_tokens[row],
            )
            tpot_s = (outcome.last_token_s[row] - first_s) / (outputs - 1) if finished and outputs > 1 else None
            waited_s = outcome.prefill_start_s[row] - arrival_s
            told.append(
                RequestRow(
                    input_tokens=int(workload.prompt_tokens[row]),
                    prefix_hit_ratio=outcome.cached_tokens[row] / max(int(workload.prompt_tokens[row]), 1),
                    kv_cache_usage=0.0,
                    requests_running=int(met[0][place]),
                    requests_waiting=int(met[1][place]),
                    prefill_tokens_in_flight=int(met[2][place]),
                    decode_tokens_in_flight=int(met[3][place]),
                    ttft_ms=(first_s - arrival_s) * 1e3 if finished else None,
                    tpot_ms=None if tpot_s is None else tpot_s * 1e3,
                    output_tokens=outputs,
                    request_id=str(workload.request_id[row]),
                    tenant=workload.tenant[row],
                    slo_class=workload.slo_class[row],
                    arrived_at_s=self.origin_s + arrival_s,
                    status=STATUSES[outcome.status[row]],
                    ttft_target_ms=_milliseconds(workload.ttft_target_s[row]),
                    tpot_target_ms=_milliseconds(workload.tpot_target_s[row]),
                    wait_ms=waited_s * 1e3 if finished else None,
                    strategy=pool.strategy[row],
                    session=pool.sessions[row],
                    pool=pool.number,  # type: ignore[arg-type]  # 0 or 1
                )
            )
        return told


def _divided(
    workload: Workload, fleet: SimulatedFleet, sessions: Sequence[str], arms: Arms, pools: int
) -> Iterator[tuple[Workload, SimulatedFleet, Sequence[str]]]:
    """The part of traffic and instances, and the sessions, of each pool."""
    if pools == 1:
        yield workload, fleet, sessions
        return
    if min(len(fleet.prefill), len(fleet.decode)) < pools:
        raise ConfigError(f"{len(fleet.prefill)} prefill and {len(fleet.decode)} decode instances are no {pools} pools")
    place = np.array([arms.pool_of(session) for session in sessions])
    for pool in range(pools):
        part = replace(fleet, prefill=fleet.prefill[pool::pools], decode=fleet.decode[pool::pools])
        rows = np.flatnonzero(place == pool)
        yield _taken(workload, rows), part, [sessions[int(row)] for row in rows]


def _taken(workload: Workload, rows: IntArray) -> Workload:
    """Some requests of a workload."""

    def some(values: Any) -> list[Any]:
        return [values[row] for row in rows]

    return replace(
        workload,
        request_id=some(workload.request_id),
        arrival_s=workload.arrival_s[rows],
        prompt_tokens=workload.prompt_tokens[rows],
        output_tokens=workload.output_tokens[rows],
        ttft_target_s=workload.ttft_target_s[rows],
        tpot_target_s=workload.tpot_target_s[rows],
        slo_class=some(workload.slo_class),
        tenant=some(workload.tenant),
        model=some(workload.model),
        block_ids=None if workload.block_ids is None else some(workload.block_ids),
    )


def _milliseconds(seconds: float) -> float | None:
    return float(seconds) * 1e3 if np.isfinite(seconds) else None


def _as_met(simulation: Simulation, rows: Sequence[int]) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """What each row met when it arrived: requests running, waiting, prompt tokens waiting, tokens in decode."""
    outcome, workload = simulation.outcome, simulation.workload
    n = simulation.submitted
    at_s = workload.arrival_s[list(rows)]
    prompts = workload.prompt_tokens[:n]
    begun, first, last = (
        np.nan_to_num(np.array(times[:n]), nan=np.inf)
        for times in (outcome.prefill_start_s, outcome.first_token_s, outcome.last_token_s)
    )
    taken: BoolArray = np.array(outcome.status[:n]) != REJECTED
    arrived = np.where(taken, workload.arrival_s[:n], np.inf)

    def by(times: FloatArray, weights: IntArray) -> IntArray:
        """Sum of weights of those whose time came before each arrival."""
        order = np.argsort(times)
        sums: IntArray = np.concatenate([[0], np.cumsum(weights[order])])
        return sums[np.searchsorted(times[order], at_s)]

    one = np.ones(n, dtype=np.int64)
    return (
        by(begun, one) - by(last, one),
        by(arrived, one) - by(begun, one),
        by(arrived, prompts) - by(first, prompts),
        by(first, prompts) - by(last, prompts),
    )
