"""One request inside the gateway: what is known of it, where it is, how it ended."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from kairos.adapters.gateway.bodies import Body, Text
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.leases import KvGrant
from kairos.adapters.gateway.stream import Usage
from kairos.scheduler_core.slo import NO_TARGET_S

if TYPE_CHECKING:
    from kairos.adapters.gateway.instances import LiveInstance


class Outcome(StrEnum):
    """How a request ended: every request has exactly one."""

    FINISHED = "finished"
    REFUSED = "refused"
    """by the gateway before it was sent anywhere, or by the engine with a 4xx answer"""
    FAILED = "failed"
    """no answer, or not a whole one"""
    CLIENT_LEFT = "client_left"


class Call(msgspec.Struct, eq=False):
    """A request for tokens. Owned by the task that serves it; times are monotonic seconds."""

    number: int
    """Its rank by arrival: the id under which policies know it."""
    request_id: str
    path: bytes
    chat: bool
    body: Body
    text: Text
    arrival_s: float
    trace_lines: bytes = b""
    """Its trace context, as headers for engines."""
    tenant: str = ""
    slo_class: str = "default"
    ttft_target_s: float = NO_TARGET_S
    tpot_target_s: float = NO_TARGET_S
    prompt_tokens: int = 1
    prompt_bytes: int = 1
    blocks: list[int] = []
    """Of its bytes, where an index of what was sent is kept."""
    token_blocks: dict[int, list[bytes]] = {}
    """Of its tokens, where engines tell of theirs and its tokens are known; by the tokens of a block."""
    turn: asyncio.Future[None] | None = None
    """Resolved when an instance takes it; its exception when none will."""
    task: asyncio.Task[None] | None = None
    answered: bool = False
    """All of the answer has gone out: that its client leaves now, or its time is over, is no loss."""
    attempts: int = 0
    failed_on: set[str] = set()
    """Instances that a first attempt failed on."""
    interruption: CallError | None = None
    """Why its task was told to stop."""
    prefill: "LiveInstance | None" = None
    decode: "LiveInstance | None" = None
    grant: KvGrant | None = None
    """KV that waits at the prefill instance until the first token comes."""
    dispatch_s: float = 0.0
    dispatch_rank: int = 0
    """Its place in the order in which prompts were sent."""
    deadline_s: float = NO_TARGET_S
    """When the first token, or the end of the prompt, must have come."""
    total_deadline_s: float = NO_TARGET_S
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    output_tokens: int = 0
    """By events at the first and when its stream has ended, then by the engine's usage."""
    held_tokens: int = 0
    """KV tokens that it adds to those of its decode instance, as of the same times."""
    usage: Usage | None = None
    expected_cached_tokens: int = 0
    predicted_ttft_s: float | None = None
    strategy: str = ""
    """What decided about it when it arrived."""
    session: str = ""
    """A hash of its session, while an experiment divides the fleet by sessions."""
    part: int = 0
    """Of the fleet, that its session goes to."""
    decision_us: float = 0.0
    met: "Met | None" = None

    @property
    def model(self) -> str:
        """The model that it names."""
        return self.body.model

    @property
    def context_tokens(self) -> int:
        """KV tokens of the request now."""
        return self.prompt_tokens + self.output_tokens

    def interrupt(self, reason: CallError) -> None:
        """Stop the task that serves it, for a reason, unless it has done its work."""
        if self.interruption is None and self.task is not None and not self.answered:
            self.interruption = reason
            self.task.cancel()

    def client_left(self) -> None:
        """Stop the task that serves it: nobody waits for it any more."""
        self.interrupt(CallError(499, "client_left", "the client left"))


class Met(msgspec.Struct, gc=False):
    """The load that a request met on its prefill instance when it was sent there."""

    running: int
    waiting: int
    prefill_tokens_in_flight: int
    decode_tokens_in_flight: int
    kv_usage_share: float
