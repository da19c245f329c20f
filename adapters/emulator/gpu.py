"""A virtual GPU on a real clock: continuous batching with the step times of a profile (docs/emulator.md).

Steps last as docs/simulator.md, rules 1 and 2, say. A step with prompts and decodes costs both, the fixed cost of
decode once less: it is one forward pass.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Part, StepTimes
from kairos.scheduler_core.telemetry import StepRecord

_MAX_LAG_S = 0.5
"""Steps that fell further behind their time than this (a busy machine) are not caught up with."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step, and the KV cache, can hold."""

    chunk_tokens: int | None = None
    """Prompt tokens of one step; None: whole prompts."""
    max_requests_per_step: int = 1
    """Prompts in one step."""
    max_batch: int = 64
    kv_tokens: int = UNLIMITED_TOKENS


@dataclass(slots=True, eq=False)
class Job:
    """One sequence. Its reader waits with `next_tokens`."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    priority: int = 0
    """Lower runs first."""
    number: int = 0
    computed: int = 0
    """Prompt tokens done, cached ones included."""
    emitted: int = 0
    ended: bool = False
    slowness: float = 1.0
    _seen: int = 0
    _waiter: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache while it decodes; one that has emitted nothing counts its first token already."""
        return self.prompt_tokens + max(self.emitted, 1)

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_tokens(self) -> int:
        """How many tokens were emitted since the last call; 0 when it has ended."""
        while self._seen == self.emitted and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        new = self.emitted - self._seen
        self._seen = self.emitted
        return new


class VirtualGpu:
    """Runs jobs in steps.

    Args:
        time_scale: real seconds per second of the profile; 0.1 runs ten times as fast.
        on_step: told every step, in seconds of the profile.
    """

    def __init__(
        self,
        step_times: StepTimes,
        limits: Limits,
        time_scale: float = 1.0,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._times = step_times
        self._limits = limits
        self._scale = time_scale
        self._on_step = on_step
        self._numbers = itertools.count()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.prompts: list[Job] = []
        """Prompts not wholly computed, by (priority, arrival)."""
        self.ready: list[Job] = []
        self.residents: list[Job] = []
        self.steps = 0
        self.generated = 0
        """Output tokens."""
        self.busy_s = 0.0
        """Of the profile's seconds."""
        self.last_step_s = 0.0
        """When the last one ended, on the monotonic clock."""
        self.lagged_s = 0.0
        """Real seconds by which steps ended late and were not caught up with."""

    @property
    def waiting(self) -> int:
        """Jobs in no step yet."""
        return sum(1 for job in self.prompts if not job.computed) + len(self.ready)

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        return len(self.residents) + sum(1 for job in self.prompts if job.computed)

    @property
    def kv_used_tokens(self) -> int:
        """KV of what is in decode or half computed."""
        return sum(job.context_tokens for job in self.residents) + sum(job.computed for job in self.prompts)

    def start(self) -> None:
        """Begin to run steps."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End, and every job with it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for job in [*self.prompts, *self.ready, *self.residents]:
            self.abort(job)

    def compute(self, job: Job) -> None:
        """Take a job with a prompt to compute; its first token comes with the step that completes it."""
        job.number = next(self._numbers)
        job.computed = 0
        self.prompts.append(job)
        self.prompts.sort(key=lambda other: (other.priority, other.number))
        self._wake.set()

    def resume(self, job: Job) -> None:
        """Take a job whose KV came from elsewhere; its first token comes with its first decode step."""
        job.computed = job.prompt_tokens
        self.ready.append(job)
        self._wake.set()

    def abort(self, job: Job) -> None:
        """Forget a job."""
        for jobs in (self.prompts, self.ready, self.residents):
            if job in jobs:
                jobs.remove(job)
        job.ended = True
        job.wake()

    # -- steps

    async def _run(self) -> None:
        end_s = time.monotonic()
        while True:
            self._admit()
            parts = self._parts()
            members = list(self.residents)
            if not parts and not members:
                self._wake.clear()
                await self._wake.wait()
                end_s = time.monotonic()
                continue
            seconds = self._seconds(parts, members)
            end_s = self._catch_up(end_s, time.monotonic()) + seconds * self._scale
            await asyncio.sleep(max(0.0, end_s - time.monotonic()))
            self.last_step_s = time.monotonic()
            self._end(parts, members, seconds)

    def _catch_up(self, end_s: float, now_s: float) -> float:
        """Where the next step begins: at the end of the last one, unless that is too long ago."""
        if now_s - end_s <= _MAX_LAG_S:
            return end_s
        self.lagged_s += now_s - end_s
        return now_s

    def _admit(self) -> None:
        """Swap out while KV is short, then admit in ready order while it fits (docs/simulator.md, rule 6)."""
        kv_tokens, residents = self._limits.kv_tokens, self.residents
        context = sum(job.context_tokens for job in residents)
        while len(residents) > 1 and context + len(residents) > kv_tokens:
            leaving = residents.pop()
            context -= leaving.context_tokens
            self.ready.insert(0, leaving)
        while self.ready and len(residents) < self._limits.max_batch:
            first = self.ready[0]
            if residents and context + first.context_tokens + len(residents) + 1 > kv_tokens:
                break
            residents.append(self.ready.pop(0))
            context += first.context_tokens

    def _parts(self) -> list[tuple[Job, Part]]:
        budget = self._limits.chunk_tokens or UNLIMITED_TOKENS
        parts: list[tuple[Job, Part]] = []
        for job in sorted(self.prompts, key=lambda job: not job.computed):  # begun ones go on
            if budget <= 0 or len(parts) >= self._limits.max_requests_per_step:
                break
            done = job.computed or job.cached_tokens
            new = min(job.prompt_tokens - done, budget)
            parts.append((job, Part(new, done)))
            budget -= new
        return parts

    def _seconds(self, parts: Sequence[tuple[Job, Part]], members: Sequence[Job]) -> float:
        seconds = 0.0
        if parts:
            seconds = self._times.prefill_step_s([part for _, part in parts])
        if members:
            seconds += self._times.decode_step_s(len(members), sum(job.context_tokens for job in members))
            if parts:
                seconds -= self._times.decode_line.a_s
        return seconds * max((job.slowness for job in (*members, *(job for job, _ in parts))), default=1.0)

    def _end(self, parts: Sequence[tuple[Job, Part]], members: Sequence[Job], seconds: float) -> None:
        self.steps += 1
        self.busy_s += seconds
        if self._on_step is not None:
            self._on_step(_record(parts, members, seconds))
        for job in members:
            if not job.ended and self._emit(job):  # an abort may have come during the step
                self.residents.remove(job)
        for job, part in parts:
            if job.ended:
                continue
            job.computed = part.context_tokens + part.new_tokens
            if job.computed == job.prompt_tokens:
                self.prompts.remove(job)
                if not self._emit(job):
                    self.ready.append(job)

    def _emit(self, job: Job) -> bool:
        """Emit a token; whether it was the last."""
        self.generated += 1
        job.emitted += 1
        job.ended = job.emitted >= job.output_tokens
        job.wake()
        return job.ended


def _record(parts: Sequence[tuple[Job, Part]], members: Sequence[Job], seconds: float) -> StepRecord:
    return StepRecord(
        "decode" if not parts else "mixed" if members else "prefill",
        seconds,
        n_requests=len(parts),
        new_tokens=sum(part.new_tokens for _, part in parts),
        cached_tokens=sum(part.context_tokens for _, part in parts),
        batch_size=len(members),
        sum_context_tokens=sum(job.context_tokens for job in members),
    )
