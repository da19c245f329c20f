"""One request inside the gateway: what is known of it, where it is, how it ended."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING

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


class Call:
    """A request for tokens. Owned by the task that serves it; times are monotonic seconds."""

    __slots__ = (
        "answered",
        "arrival_s",
        "attempts",
        "blocks",
        "body",
        "chat",
        "deadline_s",
        "decision_us",
        "decode",
        "dispatch_rank",
        "dispatch_s",
        "expected_cached_tokens",
        "failed_on",
        "first_token_s",
        "grant",
        "interruption",
        "last_token_s",
        "met",
        "number",
        "output_tokens",
        "part",
        "path",
        "predicted_ttft_s",
        "prefill",
        "prompt_bytes",
        "prompt_tokens",
        "request_id",
        "session",
        "slo_class",
        "strategy",
        "task",
        "tenant",
        "text",
        "token_blocks",
        "total_deadline_s",
        "tpot_target_s",
        "trace_lines",
        "ttft_target_s",
        "turn",
        "usage",
    )

    def __init__(
        self, number: int, request_id: str, path: bytes, chat: bool, body: Body, text: Text, arrival_s: float
    ) -> None:
        self.number = number
        """Its rank by arrival: the id under which policies know it."""
        self.request_id = request_id
        self.path = path
        self.chat = chat
        self.body = body
        self.text = text
        self.arrival_s = arrival_s
        self.trace_lines = b""
        """Its trace context, as headers for engines."""
        self.tenant = ""
        self.slo_class = "default"
        self.ttft_target_s = NO_TARGET_S
        self.tpot_target_s = NO_TARGET_S
        self.prompt_tokens = 1
        self.prompt_bytes = 1
        self.blocks: list[int] = []
        """Of its bytes, where an index of what was sent is kept."""
        self.token_blocks: dict[int, list[bytes]] = {}
        """Of its tokens, where engines tell of theirs and its tokens are known; by the tokens of a block."""
        self.turn: asyncio.Future[None] | None = None
        """Resolved when an instance takes it; its exception when none will."""
        self.task: asyncio.Task[None] | None = None
        self.answered = False
        """All of the answer has gone out: that its client leaves now, or its time is over, is no loss."""
        self.attempts = 0
        self.failed_on: set[str] = set()
        """Instances that a first attempt failed on."""
        self.interruption: CallError | None = None
        """Why its task was told to stop."""
        self.prefill: LiveInstance | None = None
        self.decode: LiveInstance | None = None
        self.grant: KvGrant | None = None
        """KV that waits at the prefill instance until the first token comes."""
        self.dispatch_s = 0.0
        self.dispatch_rank = 0
        """Its place in the order in which prompts were sent."""
        self.deadline_s = NO_TARGET_S
        """When the first token, or the end of the prompt, must have come."""
        self.total_deadline_s = NO_TARGET_S
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.output_tokens = 0
        """By events as they pass, by the engine's usage at the end."""
        self.usage: Usage | None = None
        self.expected_cached_tokens = 0
        self.predicted_ttft_s: float | None = None
        self.strategy = ""
        """What decided about it when it arrived."""
        self.session = ""
        """A hash of its session, while an experiment divides the fleet by sessions."""
        self.part = 0
        """Of the fleet, that its session goes to."""
        self.decision_us = 0.0
        self.met: Met | None = None

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


class Met:
    """The load that a request met on its prefill instance when it was sent there."""

    __slots__ = ("decode_tokens_in_flight", "kv_usage_share", "prefill_tokens_in_flight", "running", "waiting")

    def __init__(
        self,
        running: int,
        waiting: int,
        prefill_tokens_in_flight: int,
        decode_tokens_in_flight: int,
        kv_usage_share: float,
    ) -> None:
        self.running = running
        self.waiting = waiting
        self.prefill_tokens_in_flight = prefill_tokens_in_flight
        self.decode_tokens_in_flight = decode_tokens_in_flight
        self.kv_usage_share = kv_usage_share
