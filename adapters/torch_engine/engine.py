"""The torch engine: sequences in slots, one forward pass a step, what the policies plan put into it.

Decodes go first, one token each; prompts fill what is left of the step's tokens, chunk by chunk. The forward pass runs
in a thread of its own, so that requests are answered meanwhile.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.embedded.planner import Limits, Room
from kairos.adapters.embedded.settings import EngineSettings
from kairos.adapters.emulator.device import Job
from kairos.adapters.emulator.prompts import BadRequest, Prompt
from kairos.adapters.http_client import UpstreamError
from kairos.adapters.torch_engine.jobs import TorchJob
from kairos.adapters.torch_engine.model import Chunk, Model
from kairos.adapters.torch_engine.policies import Held, Policies
from kairos.adapters.torch_engine.text import Text
from kairos.scheduler_core.domain import Part, Profile
from kairos.scheduler_core.telemetry import StepRecord

LEAST_PROMPT_TOKENS = 16
_LOOK_S = 0.005
"""How often one that has work and could do none looks again: somebody was held for a while."""


class Step(NamedTuple):
    """What one step computes."""

    chunks: list[Chunk]
    decodes: list[TorchJob]
    """Of the first chunks."""
    prompts: list[tuple[TorchJob, Part]]
    """Of the others."""


class TorchEngine:
    """A device (adapters/emulator/device.py) with a real model.

    Args:
        step_tokens: most tokens of a step.
        on_step: told every step.

    Raises:
        InputError: a setting that does not fit.
    """

    def __init__(
        self,
        model: Model,
        text: Text,
        profile: Profile,
        settings: EngineSettings,
        step_tokens: int,
        *,
        threads: int = 1,
        api_key: str = "",
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._model, self._text = model, text
        cache = model.cache
        limits = Limits(step_tokens, LEAST_PROMPT_TOKENS, cache.slots, cache.slots * cache.slot_tokens)
        version = str(torch.__version__)
        self.policies = Policies(settings, api_key, profile, limits, version, self._place, on_step)
        self._free = list(range(cache.slots))
        self._numbers = itertools.count()
        self._waiting: dict[int, TorchJob] = {}
        """Prompts without a slot, by arrival."""
        self._incoming: dict[int, TorchJob] = {}
        """Those whose KV is elsewhere, without a slot."""
        self._prompts: dict[int, TorchJob] = {}
        """Prompts that are partly computed."""
        self._decodes: dict[int, TorchJob] = {}
        self._stopped = False
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "torch", torch.set_num_threads, (threads,))
        self.task: asyncio.Task[None]
        """Of its steps, once it has started; what fails in one ends it."""
        self.steps = 0
        self.generated = 0
        self.busy_s = 0.0
        self.last_step_s = 0.0
        self.lagged_s = 0.0

    @property
    def waiting(self) -> int:
        """Jobs in no step yet."""
        return len(self._waiting) + len(self._incoming)

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return self._model.cache.slots - len(self._free)

    @property
    def kv_used_tokens(self) -> int:
        """KV of what is in decode or half computed."""
        return sum(job.context_tokens for job in self._decodes.values()) + sum(
            job.computed for job in self._prompts.values()
        )

    def start(self) -> None:
        """Begin to run steps."""
        self.policies.start()
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End, and every job with it."""
        if self._stopped:
            return
        self._stopped = True
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(self.policies.close)
        for job in [job for jobs in self._places for job in jobs.values()]:
            self.abort(job)
        self._thread.shutdown()

    # -- jobs

    def job(self, prompt: Prompt, output_tokens: int, told: Mapping[str, Any]) -> TorchJob:
        """A job for a prompt; `told` is the body of its request.

        Raises:
            BadRequest: a token that the model does not have, or more of them than a slot holds.
        """
        content = prompt.content
        ids = self._text.ids(content.decode()) if isinstance(content, bytes) else content
        vocab, most = self._model.shape.vocab, self._model.cache.slot_tokens
        if not ids or min(ids) < 0 or max(ids) >= vocab:
            raise BadRequest(f"a prompt has at least one token, and tokens are from 0 to {vocab - 1}")
        if len(ids) + output_tokens > most:
            raise BadRequest(f"{len(ids)} prompt tokens and max_tokens {output_tokens} are over {most} tokens")
        number = next(self._numbers)
        ends = () if told.get("ignore_eos") else self._model.shape.end_ids
        entry = self.policies.entry(number, len(ids), told)
        job = TorchJob(len(ids), output_tokens, number=number, ids=ids, text_of=self._text, end_ids=ends, entry=entry)
        entry.request = job
        return job

    def compute(self, job: Job) -> None:
        """Take a job with a prompt to compute; its first token comes with the step that completes it."""
        own = _own(job)
        self._waiting[own.number] = own
        self.policies.arrived(own.entry)
        self._wake.set()

    async def admit(self, job: Job) -> None:
        """Wait until the policies let a job in whose KV is elsewhere, and there is a slot for it."""
        own = _own(job)
        if not own.entry.remote:
            own.entry.remote = True
            self._incoming[own.number] = own
            self.policies.arrived(own.entry)
            self._wake.set()
        await own.admitted.wait()

    async def receive(self, job: Job, kv: bytes | None) -> None:
        """Take the KV of an admitted job.

        Raises:
            UpstreamError: there is none, or it is that of another model.
        """
        own = _own(job)
        if kv is None:
            raise UpstreamError("lost", "the KV was taken before, or its lease has ended")
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._model.cache.load, own.slot, own.prompt_tokens - 1, kv)
        except ValueError as problem:
            raise UpstreamError("protocol", f"{problem}; prefill and decode worker need the same model") from None

    def resume(self, job: Job) -> None:
        """Take a job whose KV was received; its first token comes with its first decode step."""
        own = _own(job)
        own.computed = own.prompt_tokens
        self._decodes[own.number] = own
        self._wake.set()

    def handed_over(self, job: Job) -> bytes:
        """The KV of a prompt that has ended; its last token is computed again by the decode worker."""
        own = _own(job)
        kv, own.kv = own.kv, b""
        return kv

    def abort(self, job: Job) -> None:
        """Forget a job. Its slot is another's from the next step on."""
        own = _own(job)
        for jobs in self._places:
            jobs.pop(own.number, None)
        self.policies.left(own.entry)
        if own.slot >= 0:
            self._free.append(own.slot)
            own.slot = -1
        own.ended = True
        own.kv = b""
        own.wake()
        self._wake.set()

    @property
    def _places(self) -> tuple[dict[int, TorchJob], ...]:
        return self._waiting, self._incoming, self._prompts, self._decodes

    def _place(self, entry: Entry, now_s: float) -> None:
        job: TorchJob = entry.request
        mirror = self.policies.planner.mirror
        if job.output:
            mirror.emitted(entry, len(job.output), job.context_tokens, now_s)
        elif job.slot < 0:
            mirror.arrive(entry, now_s)
        elif job.computed < job.prompt_tokens and not entry.remote:
            mirror.computed(entry, job.computed, now_s)

    # -- steps

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            step = self._next_step() if any(self._places) else None
            if step is None or not step.chunks:
                self._wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if step is None else _LOOK_S):
                        await self._wake.wait()
                continue
            began_s = time.monotonic()
            tokens, seconds = await loop.run_in_executor(self._thread, self._compute, step)
            self._end(step, tokens, began_s, seconds)

    def _next_step(self) -> Step:
        plan = self.policies.plan(Room(len(self._free), self._free_tokens(), len(self._decodes)))
        step = Step([], [], [])
        held = {entry.request_id for entry in plan.held}
        for job in self._decodes.values():
            if job.number not in held:
                newest = job.output[-1] if job.output else job.ids[-1]
                step.chunks.append(Chunk(job.slot, job.held_tokens, (newest,)))
                step.decodes.append(job)
        left = plan.tokens - len(step.chunks)
        for job in _in_order(self._prompts, plan.prompts):
            if left > 0 and job.number not in held:
                left -= self._add(step, job, left)
        scheduled: list[int] = []
        for number in dict.fromkeys((*plan.enter, *(() if plan.closed else (*self._incoming, *self._waiting)))):
            if not self._free:
                break
            if number in self._incoming:
                self._let_in(self._incoming.pop(number))
                scheduled.append(number)
            elif number in self._waiting and left > 0:
                job = self._waiting.pop(number)
                job.slot = self._free.pop()
                self._prompts[number] = job
                left -= self._add(step, job, left)
        scheduled += [job.number for job in (*step.decodes, *(job for job, _ in step.prompts))]
        self.policies.began([(job.entry, part) for job, part in step.prompts], scheduled, left > 0)
        for job in (*step.decodes, *(job for job, _ in step.prompts)):
            job.entry.held_since_s = None
        return step

    def _free_tokens(self) -> int:
        return len(self._free) * self._model.cache.slot_tokens

    def _add(self, step: Step, job: TorchJob, left: int) -> int:
        """Put as much of a prompt into the step as there are tokens left; how many that is."""
        start = job.computed
        count = min(job.prompt_tokens - start, left)
        step.chunks.append(Chunk(job.slot, start, job.ids[start : start + count]))
        step.prompts.append((job, Part(count, start)))
        return count

    def _let_in(self, job: TorchJob) -> None:
        job.slot = self._free.pop()
        self.policies.planner.mirror.prompt_done(job.entry)
        job.admitted.set()

    def _compute(self, step: Step) -> tuple[list[int], float]:
        """In the thread: the tokens of the step, how long it took, and then the KV that is to leave."""
        started_s = time.perf_counter()
        tokens = self._model.step(step.chunks)
        seconds = time.perf_counter() - started_s
        for (job, part), chunk in zip(step.prompts, step.chunks[len(step.decodes) :], strict=True):
            if job.hands_over and part.context_tokens + part.new_tokens == job.prompt_tokens:
                job.kv = self._model.cache.dump(chunk.slot, job.prompt_tokens - 1)
        return tokens, seconds

    def _end(self, step: Step, tokens: Sequence[int], began_s: float, seconds: float) -> None:
        now_s = time.monotonic()
        self.steps += 1
        self.busy_s += seconds
        self.last_step_s = now_s
        contexts = [chunk.start for chunk in step.chunks[: len(step.decodes)]]
        done, emitting = [], list(step.decodes)
        for job, part in step.prompts:
            job.computed = part.context_tokens + part.new_tokens
            if job.computed == job.prompt_tokens:
                done.append(job)
                emitting.append(job)
        told = dict(zip([*step.decodes, *(job for job, _ in step.prompts)], tokens, strict=True))
        finished = []
        for job in emitting:
            if job.ended:  # its client left during the step
                continue
            self.generated += 1
            if self._prompts.pop(job.number, None) is not None:
                self._decodes[job.number] = job
            if job.emit(told[job]):
                finished.append(len(job.output))
                self._leave(job)
            else:
                self.policies.planner.mirror.emitted(job.entry, len(job.output), job.context_tokens, now_s)
        prompts = [(job.entry, part) for job, part in step.prompts]
        self.policies.ended(Held(prompts, [job.number for job in done], contexts, finished, began_s, seconds))

    def _leave(self, job: TorchJob) -> None:
        """It has its last token; what it hands over stays until it is fetched."""
        self._decodes.pop(job.number, None)
        self.policies.left(job.entry)
        self._free.append(job.slot)
        job.slot = -1


def _own(job: Job) -> TorchJob:
    assert isinstance(job, TorchJob)
    return job


def _in_order(jobs: Mapping[int, TorchJob], first: Iterable[Any]) -> list[TorchJob]:
    """The jobs, those that are named first, in that order."""
    return [jobs[number] for number in dict.fromkeys((*first, *jobs)) if number in jobs]
