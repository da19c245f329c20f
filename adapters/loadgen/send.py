"""Sends a workload, each request when it is due whatever became of those before it, and watches the answers.

Times are seconds from the start. A request counts from the moment it was due: what the generator itself came too late
is in its TTFT, and is told apart in `lag_s`.
"""

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.stream import Relayed
from kairos.adapters.http_client import HttpPool, Response, UpstreamError
from kairos.adapters.loadgen.prompts import prompt_json
from kairos.adapters.simulator.evidence import Gaps
from kairos.adapters.simulator.outcome import FAILED, FINISHED, REJECTED, Outcome
from kairos.adapters.simulator.run import table_of
from kairos.adapters.simulator.tables import RequestTable, Workload
from kairos.scheduler_core import slo
from kairos.scheduler_core.slo import NO_TARGET_S, FloatArray

_AHEAD_S = 0.25
"""A request is written out so long before it is due, and connections are opened."""
_REFUSED = frozenset({400, 401, 403, 404, 413, 429, 503})
"""Answers that say that a request was not taken; others are failures."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go."""

    url: str
    model: str
    """Asked for where the trace names none."""
    classes: frozenset[str] = frozenset()
    """SLO classes that it knows; of others only the targets are sent."""
    key: str = ""
    patience_s: float = 1800.0
    """How long one answer may keep silent."""


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a live run leaves behind: a simulated one's columns, as far as a client can see them."""

    requests: RequestTable
    gaps: Gaps
    decision_us: FloatArray
    """Of each request whose answer told it."""
    lag_s: FloatArray
    """(n,) how much later than due each was sent; NaN where it was not."""
    problems: Counter[str] = field(default_factory=Counter)
    """What was answered to requests that did not finish."""

    @property
    def lag_p99_s(self) -> float:
        """The generator's own lateness: above 20 ms the figures of a run are not those of its arrivals."""
        return float(np.nanquantile(self.lag_s, 0.99)) if np.isfinite(self.lag_s).any() else 0.0


async def send_all(
    workload: Workload, endpoint: Endpoint, progress: Callable[[int], None] = lambda ended: None
) -> LiveRun:
    """Send every request at its arrival time, the first one at once, and wait until all have ended.

    Args:
        workload: what is sent.
        endpoint: where to.
        progress: told how many have ended.
    """
    generator = _Generator(workload, endpoint, progress)
    gc.collect()
    gc.freeze()
    try:
        return await generator.run()
    finally:
        gc.unfreeze()
        generator.pool.close()


class _Generator:
    """One run."""

    def __init__(self, workload: Workload, endpoint: Endpoint, progress: Callable[[int], None]) -> None:
        self.pool = HttpPool(endpoint.url, connect_s=10.0)
        self._workload, self._endpoint, self._progress = workload, endpoint, progress
        self._outcome = Outcome.of(workload)
        self._lag_s = np.full(len(workload), np.nan)
        self._decision_us: list[float] = []
        self._problems: Counter[str] = Counter()
        self._due_s = (workload.arrival_s - workload.arrival_s[:1]).tolist()
        self._first_arrival_s = float(workload.arrival_s[0]) if len(workload) else 0.0
        self._began_s = 0.0
        self._ended = 0

    async def run(self) -> LiveRun:
        if self._due_s:
            self._body(0)  # makes what all prompts are cut from
        self._began_s = time.perf_counter() + _AHEAD_S
        async with asyncio.TaskGroup() as group:
            for row, due_s in enumerate(self._due_s):
                await asyncio.sleep(self._began_s + due_s - _AHEAD_S - time.perf_counter())
                group.create_task(self._one(row, due_s))
        outcome = self._outcome
        return LiveRun(
            table_of(self._workload, outcome, "all"),
            Gaps(np.array(outcome.itl_row, dtype=np.int64), np.array(outcome.itl_s)),
            np.array(self._decision_us),
            self._lag_s,
            self._problems,
        )

    def _now_s(self) -> float:
        """On the workload's clock."""
        return time.perf_counter() - self._began_s + self._first_arrival_s

    async def _one(self, row: int, due_s: float) -> None:
        headers, body = self._headers(row), self._body(row)
        path, patience_s = b"/v1/completions", self._endpoint.patience_s
        try:
            await asyncio.sleep(self._began_s + due_s - time.perf_counter())
            self._lag_s[row] = max(0.0, time.perf_counter() - self._began_s - due_s)
            response = await self.pool.send(b"POST", path, headers, body, first_byte_s=patience_s, idle_s=patience_s)
            del body
            try:
                await self._watch(row, response)
            finally:
                response.close()
        except UpstreamError as problem:
            self._failed(row, FAILED, problem.kind)
        except CallError as problem:  # an error event in the stream
            self._failed(row, FAILED, problem.code)
        finally:
            self._ended += 1
            self._progress(self._ended)

    def _failed(self, row: int, status: int, problem: str) -> None:
        self._outcome.status[row] = status
        self._problems[problem] += 1

    def _headers(self, row: int) -> list[tuple[bytes, bytes]]:
        workload, endpoint = self._workload, self._endpoint
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", str(workload.request_id[row]).encode()),
        ]
        if endpoint.key:
            headers.append((b"authorization", b"Bearer " + endpoint.key.encode()))
        if tenant := workload.tenant[row]:
            headers.append((b"x-kairos-tenant", tenant.encode()))
        if (name := workload.slo_class[row]) in endpoint.classes:
            headers.append((b"x-kairos-class", name.encode()))
        targets = ((b"x-kairos-ttft-s", workload.ttft_target_s), (b"x-kairos-tpot-s", workload.tpot_target_s))
        headers += [(header, b"%.9g" % of[row]) for header, of in targets if of[row] < NO_TARGET_S]
        return headers

    def _body(self, row: int) -> bytes:
        rest = {
            "model": self._workload.model[row] or self._endpoint.model,
            "max_tokens": int(self._workload.output_tokens[row]),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return b'{"prompt":%b,%b' % (prompt_json(self._workload, row), json.dumps(rest).encode()[1:])

    async def _watch(self, row: int, response: Response) -> None:
        """Note each token of an answer as it comes."""
        outcome = self._outcome
        if response.status != 200:
            await response.body()
            self._failed(row, REJECTED if response.status in _REFUSED else FAILED, str(response.status))
            return
        self._note_headers(row, response)
        tpot_target_s = float(self._workload.tpot_target_s[row])
        first_s = last_s = longest_s = 0.0
        seen = 0
        relayed = Relayed(keep_usage=True)
        while data := await response.chunk():
            relayed.feed(data)
            if relayed.events == seen:
                continue
            now_s = self._now_s()
            if not seen:
                first_s = last_s = outcome.first_token_s[row] = now_s
                seen = 1
            for k in range(seen, relayed.events):  # those that came together have no time between them
                gap_s, last_s = now_s - last_s, now_s
                longest_s = max(longest_s, gap_s)
                outcome.itl_s.append(gap_s)
                outcome.itl_row.append(row)
                outcome.tokens_in_time[row] += now_s <= slo.token_deadline_s(first_s, tpot_target_s, k)
            seen = relayed.events
        if not relayed.done or not seen:
            self._failed(row, FAILED, "cut short")
            return
        if relayed.usage is not None:
            outcome.cached_tokens[row] = relayed.usage.cached_tokens or 0
            if relayed.usage.completion_tokens not in (None, int(self._workload.output_tokens[row])):
                self._failed(row, FAILED, "other length than asked for")
                return
        if seen > 1:
            outcome.max_itl_s[row] = longest_s
        outcome.last_token_s[row] = last_s
        outcome.status[row] = FINISHED

    def _note_headers(self, row: int, response: Response) -> None:
        """What Kairos's gateway tells of its decision; another endpoint tells nothing."""
        outcome = self._outcome
        for role, column in (("prefill", outcome.prefill_instance), ("decode", outcome.decode_instance)):
            name = response.header(f"x-kairos-{role}-instance".encode()).decode("latin-1")
            number = name.removeprefix(f"{role}-")
            column[row] = int(number) if number.isdecimal() else -1
        if decided := response.header(b"x-kairos-decision-us"):
            self._decision_us.append(float(decided))
        if waited := response.header(b"x-kairos-waited-s"):
            outcome.prefill_start_s[row] = float(self._workload.arrival_s[row]) + float(waited)
