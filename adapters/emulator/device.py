"""What computes behind a worker's HTTP side: a virtual GPU (gpu.py), or a real model (adapters/torch_engine)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kairos.adapters.emulator.prompts import Prompt


@dataclass(slots=True, eq=False)
class Job:
    """One sequence. Its reader waits with `next_tokens`."""

    prompt_tokens: int
    output_tokens: int
    """Most that it may have."""
    cached_tokens: int = 0
    priority: int = 0
    """Lower runs first."""
    number: int = 0
    computed: int = 0
    """Prompt tokens done, cached ones included."""
    emitted: int = 0
    ended: bool = False
    hands_over: bool = False
    """Its KV is for a decode worker."""
    slowness: float = 1.0
    _seen: int = 0
    _waiter: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache while it decodes; one that has emitted nothing counts its first token already."""
        return self.prompt_tokens + max(self.emitted, 1)

    @property
    def finish_reason(self) -> str:
        """Why it ended, in the words of the OpenAI API."""
        return "length"

    def token_ids(self, first: int, count: int) -> Sequence[int]:
        """The ids of `count` output tokens from the `first`-th, from 1."""
        return range(first, first + count)

    def text(self, first: int, count: int) -> str:
        """The text of these tokens."""
        return "".join(f" t{k}" for k in self.token_ids(first, count))

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


class Device(Protocol):
    """Runs jobs in steps."""

    steps: int
    generated: int
    """Output tokens."""
    busy_s: float
    last_step_s: float
    """When the last one ended, on the monotonic clock."""
    lagged_s: float
    """Real seconds by which steps ended late and were not caught up with."""

    @property
    def waiting(self) -> int:
        """Jobs in no step yet."""
        ...

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        ...

    @property
    def kv_used_tokens(self) -> int:
        """KV of what is in decode or half computed."""
        ...

    def start(self) -> None:
        """Begin to run steps."""
        ...

    async def stop(self) -> None:
        """End, and every job with it."""
        ...

    def job(self, prompt: Prompt, output_tokens: int, told: Mapping[str, Any]) -> Job:
        """A job for a prompt; `told` is the body of its request.

        Raises:
            BadRequest: it cannot be computed here.
        """
        ...

    def compute(self, job: Job) -> None:
        """Take a job with a prompt to compute; its first token comes with the step that completes it."""
        ...

    async def admit(self, job: Job) -> None:
        """Wait until there is room for a job whose KV is elsewhere. May be called again after it was cancelled."""
        ...

    async def receive(self, job: Job, kv: bytes | None) -> None:
        """Take the KV of an admitted job; None: its holder had none.

        Raises:
            UpstreamError: this is no KV that it could go on with.
        """
        ...

    def resume(self, job: Job) -> None:
        """Take a job whose KV was received; its first token comes with its first decode step."""
        ...

    def handed_over(self, job: Job) -> bytes:
        """The KV of a prompt that has ended, for its decode worker."""
        ...

    def abort(self, job: Job) -> None:
        """Forget a job."""
        ...
