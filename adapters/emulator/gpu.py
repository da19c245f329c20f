"""A virtual GPU on a real clock: continuous batching with the step times of a profile (docs/emulator.md).

Steps last as docs/simulator.md, rules 1 and 2, say. A step with prompts and decodes costs both, the fixed cost of
decode once less: it is one forward pass.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kairos.adapters.emulator.device import Job
from kairos.adapters.emulator.prompts import Prompt
from kairos.scheduler_core.config import KvTransfer
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Part, StepTimes
from kairos.scheduler_core.telemetry import StepRecord

_LOOK_S = 0.005
"""How often one that waits for room looks."""
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


class VirtualGpu:
    """Runs jobs in steps.

    Args:
        time_scale: real seconds per second of the profile; 0.1 runs ten times as fast.
        on_step: told every step, in seconds of the profile.
        link: over which KV comes.
    """

    def __init__(
        self,
        step_times: StepTimes,
        limits: Limits,
        time_scale: float = 1.0,
        on_step: Callable[[StepRecord], None] | None = None,
        link: KvTransfer | None = None,
    ) -> None:
        self._times = step_times
        self._limits = limits
        self._link = link or KvTransfer()
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

    def job(self, prompt: Prompt, output_tokens: int, told: Mapping[str, Any]) -> Job:
        """A job for a prompt."""
        return Job(prompt.tokens, output_tokens)

    def compute(self, job: Job) -> None:
        """Take a job with a prompt to compute; its first token comes with the step that completes it."""
        job.number = next(self._numbers)
        job.computed = 0
        self.prompts.append(job)
        self.prompts.sort(key=lambda other: (other.priority, other.number))
        self._wake.set()

    async def admit(self, job: Job) -> None:
        """Wait until there is room for a job whose KV is elsewhere."""
        while not self._room_for(job):
            await asyncio.sleep(_LOOK_S)

    def _room_for(self, job: Job) -> bool:
        held = self.residents or self.ready
        if len(self.residents) + len(self.ready) >= self._limits.max_batch:
            return False
        return not held or self.kv_used_tokens + job.context_tokens + 1 <= self._limits.kv_tokens

    async def receive(self, job: Job, kv: bytes | None) -> None:
        """Take as long as KV does; where there is none it goes on as vLLM does, with wrong tokens."""
        transfer_s = self._link.latency_s + job.prompt_tokens * self._link.bytes_per_token / self._link.bytes_per_s
        await asyncio.sleep(transfer_s * self._scale)

    def handed_over(self, job: Job) -> bytes:
        """No bytes: virtual KV takes time, not room."""
        return b""

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
