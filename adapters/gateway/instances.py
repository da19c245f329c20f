"""The engines behind the gateway: where they are, whether they answer, and what the gateway has running on them."""

import time
from collections import Counter
from enum import StrEnum

import msgspec

from kairos.adapters.gateway.calls import Call
from kairos.adapters.gateway.kv_events import KvEventReader
from kairos.adapters.gateway.prefixes import PrefixIndex
from kairos.adapters.http_client import Headers, HttpPool, header_lines
from kairos.scheduler_core.config import (
    ComputesPrompts,
    DecodeGroup,
    Group,
    HandsOver,
    InstanceRole,
    MixedGroup,
    PrefillGroup,
)
from kairos.scheduler_core.decider import PrefillLane
from kairos.scheduler_core.domain import (
    UNLIMITED_TOKENS,
    Control,
    DecodeInstance,
    PrefillInstance,
    Profile,
    Resident,
    StepTimes,
)
from kairos.scheduler_core.policy import DecodeLoad
from kairos.scheduler_core.slo import NO_TARGET_S, ttft_deadline_s

AHEAD_S = 0.05
"""So long before an instance has computed all that it has it gets the next prompt: time for the way there, and no more,
since what has been sent stays before all that comes later."""


class State(StrEnum):
    """Whether an instance gets requests."""

    NEW = "new"
    """not seen healthy yet"""
    READY = "ready"
    DOWN = "down"
    """it does not answer"""
    DRAINING = "draining"
    """it ends what it has"""
    REFUSED = "refused"
    """an engine or a version that Kairos does not know"""


class PrefillSide:
    """An instance as one that computes prompts."""

    def __init__(
        self,
        instance: PrefillInstance,
        limit: int,
        index: PrefixIndex | None,
        kv_events: KvEventReader | None,
    ) -> None:
        self.instance = instance
        self.limit = limit
        """Prompts that may be there at a time."""
        self.index = index
        """What was sent there; None: it keeps no prefixes, or tells of them itself."""
        self.kv_events = kv_events
        self.lane: PrefillLane
        self.group: object = None
        self.flights: dict[int, float] = {}
        """Predicted end of each prompt there, by the request's number; in the order in which they were sent."""
        self.tokens: dict[int, int] = {}
        self.sum_tokens = 0
        """Of the prompts there."""
        self.unseen: dict[int, Call] = {}
        """Those of them whose end nobody will see; in the same order."""
        self.free_at_s = 0.0
        """Predicted end of all that is there, which is that of the last one sent; 0 when there is nothing."""
        self.ended_s = 0.0
        """When the last one ended."""

    @property
    def knows_prefixes(self) -> bool:
        """Whether requests see another prefix cache here than elsewhere."""
        return self.index is not None or self.kv_events is not None

    def cached_tokens(self, call: Call) -> int:
        """Prompt tokens of a request that are thought to be in its KV cache; at least one is always computed."""
        if self.kv_events is not None and call.token_blocks:
            stored = self.kv_events.stored
            return min(stored.hit_tokens(call.token_blocks.get(stored.block_tokens, ())), call.prompt_tokens - 1)
        if self.index is not None:
            return self.index.hit_tokens(call.blocks, call.prompt_bytes, call.prompt_tokens)
        return 0

    def has_room(self, now_s: float) -> bool:
        """Whether one more may be sent: nothing is there, or not too much and that is about to end.

        An engine that keeps our order itself takes as many as it may have.
        """
        if len(self.flights) >= self.limit:
            return False
        keeps_order = self.instance.control is Control.GATEWAY_PRIORITY
        return not self.flights or keeps_order or self.free_at_s - now_s <= AHEAD_S

    def send(self, call: Call, prefill_s: float, now_s: float) -> None:
        """Count a prompt that is sent now."""
        self.flights[call.number] = self.free_at_s = max(self.free_at_s, now_s) + prefill_s
        self.tokens[call.number] = call.prompt_tokens
        self.sum_tokens += call.prompt_tokens

    def end(self, call: Call, now_s: float) -> tuple[float, int]:
        """A prompt that is there is done or given up: the seconds that were its own, and its tokens."""
        if self.flights.pop(call.number) == self.free_at_s:
            self.free_at_s = next(reversed(self.flights.values()), 0.0)
        self.unseen.pop(call.number, None)
        tokens = self.tokens.pop(call.number)
        self.sum_tokens -= tokens
        seconds = now_s - max(call.dispatch_s, self.ended_s)
        self.ended_s = now_s
        return max(seconds, 0.0), tokens


class DecodeSide:
    """An instance as one that produces tokens."""

    def __init__(self, instance: DecodeInstance) -> None:
        self.instance = instance
        self.expected: dict[int, int] = {}
        """Context tokens of requests that are on their way here, by number."""
        self.residents: set[int] = set()
        self.sum_context_tokens = 0
        """Of the residents."""
        self.last_token_s = 0.0
        """When anything came from here last: a sign that it steps."""
        self.tells_steps = False
        """Its metrics count the tokens that it generates."""
        self._targets: Counter[float] = Counter()

    @property
    def requests(self) -> int:
        """Those placed here."""
        return len(self.expected) + len(self.residents)

    def load(self) -> DecodeLoad:
        """Its load, for placement."""
        return DecodeLoad(
            self.instance,
            len(self.residents),
            self.sum_context_tokens,
            len(self.expected),
            sum(self.expected.values()),
            min(self._targets, default=NO_TARGET_S),
        )

    def expect(self, call: Call) -> None:
        """Count a request from its placement on."""
        self.expected[call.number] = call.prompt_tokens
        self._targets[call.tpot_target_s] += 1

    def enter(self, call: Call) -> None:
        """Its first token came."""
        if self.expected.pop(call.number, None) is not None:
            self.residents.add(call.number)
            call.held_tokens = call.context_tokens
            self.sum_context_tokens += call.held_tokens

    def produced(self, tokens: int) -> float:
        """More tokens of a resident came; when."""
        self.sum_context_tokens += tokens
        self.last_token_s = now_s = time.monotonic()
        return now_s

    def stream_ended(self, call: Call, tokens: int) -> None:
        """The stream of a resident has ended after so many tokens; those after the first were told by `produced`."""
        call.held_tokens += tokens - call.output_tokens
        call.output_tokens = tokens

    def leave(self, call: Call) -> None:
        """It ended, however; more than once is once."""
        here = self.expected.pop(call.number, None) is not None
        if call.number in self.residents:
            self.residents.remove(call.number)
            self.sum_context_tokens -= call.held_tokens
            here = True
        if here:
            self._targets[call.tpot_target_s] -= 1
            if not self._targets[call.tpot_target_s]:
                del self._targets[call.tpot_target_s]


class Scraped(msgspec.Struct, frozen=True):
    """What an engine says of its own load."""

    running: int = 0
    waiting: int = 0
    kv_usage_share: float = 0.0
    kv_expired: int = 0
    """KV that a NIXL prefill engine gave up because nobody took it in time."""


class LiveInstance:
    """One engine.

    Args:
        instance_id: its role and a number, `prefill-0`.
        group: of the configuration.
        serves: the models it answers to, adapters included.
    """

    def __init__(
        self,
        instance_id: str,
        role: InstanceRole,
        group: Group,
        profile: Profile,
        serves: frozenset[str],
        step_times: StepTimes,
        http: HttpPool,
        key: str,
    ) -> None:
        self.instance_id = instance_id
        self.number = int(instance_id.rpartition("-")[2])
        self.role = role
        self.group = group
        self.profile = profile
        self.model_version = ""
        """Of the model that predicts its step times, where one was pulled."""
        self.serves = serves
        self.http = http
        self.key_header: Headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
        """The key that it is told, if it wants one."""
        self.key_line = header_lines(self.key_header)
        self.prefill_line = b"x-kairos-prefill-instance: %b\r\n" % instance_id.encode()
        self.decode_line = b"x-kairos-decode-instance: %b\r\n" % instance_id.encode()
        self.state = State.NEW
        self.problem = ""
        """Why it gets no requests."""
        self.engine: str = group.engine or ""
        self.version = ""
        self.connector = group.connector if isinstance(group, HandsOver) else ""
        self.mooncake_engine_id = ""
        """What a Mooncake prefill engine calls itself."""
        self.scraped = Scraped()
        self.relayed = 0
        """Requests of other paths that are there."""
        control = group.control if group.control is Control.GATEWAY_PRIORITY else Control.GATEWAY
        self.passes_priority = control is Control.GATEWAY_PRIORITY
        self.prefill = _prefill_side(instance_id, group, step_times, control, http.host)
        self.decode = _decode_side(instance_id, group, step_times, control)

    def predict_with(self, step_times: StepTimes, version: str) -> None:
        """Predict with a model that was pulled from the next layout of the queues on."""
        self.model_version = version
        if self.prefill is not None:
            self.prefill.instance = msgspec.structs.replace(self.prefill.instance, step_times=step_times)
        if self.decode is not None:
            self.decode.instance = msgspec.structs.replace(self.decode.instance, step_times=step_times)

    def open(self) -> None:
        """Hear what it says of its cache."""
        if self.prefill is not None and self.prefill.kv_events is not None:
            self.prefill.kv_events.start()

    def close(self) -> None:
        """End the connections to it."""
        self.http.close()
        if self.prefill is not None and self.prefill.kv_events is not None:
            self.prefill.kv_events.close()

    @property
    def bootstrap_port(self) -> int:
        """Where decode instances ask a prefill instance for KV; 0 on others."""
        return self.group.bootstrap_port if isinstance(self.group, PrefillGroup) else 0

    @property
    def bootstrap_address(self) -> str:
        """The same as an address."""
        return f"http://{self.http.host}:{self.bootstrap_port}"

    @property
    def handshake(self) -> str:
        """How it hands over: only instances of one handshake make a pair."""
        return "sglang" if self.engine == "sglang" else self.connector

    @property
    def is_ready(self) -> bool:
        """Whether it may get requests."""
        return self.state is State.READY

    @property
    def requests(self) -> int:
        """Requests that are there, of any kind."""
        prefill = len(self.prefill.flights) if self.prefill else 0
        return prefill + (self.decode.requests if self.decode else 0) + self.relayed


def _prefill_side(instance_id: str, group: Group, times: StepTimes, control: Control, host: str) -> PrefillSide | None:
    if not isinstance(group, ComputesPrompts):
        return None
    instance = PrefillInstance(instance_id, times, group.chunk_tokens, group.max_requests_per_step, control)
    index = PrefixIndex(group.kv_tokens) if group.prefix_cache and group.kv_tokens else None
    kv_events = None
    if group.kv_events_port is not None:
        replay = "" if group.kv_replay_port is None else f"tcp://{host}:{group.kv_replay_port}"
        kv_events = KvEventReader(f"tcp://{host}:{group.kv_events_port}", replay)
    return PrefillSide(instance, group.in_flight, index, kv_events)


def _decode_side(instance_id: str, group: Group, times: StepTimes, control: Control) -> DecodeSide | None:
    if not isinstance(group, DecodeGroup | MixedGroup):
        return None
    instance = DecodeInstance(
        instance_id,
        times,
        group.max_batch,
        group.kv_tokens or UNLIMITED_TOKENS,
        group.batch_limit or UNLIMITED_TOKENS,
        control,
    )
    return DecodeSide(instance)


def resident_of(call: Call, now_s: float) -> Resident:
    """A request as decode placement sees it: its first token comes from decode."""
    due_s = ttft_deadline_s(call.arrival_s, call.ttft_target_s)
    return Resident(
        call.number,
        call.prompt_tokens + 1,
        0,
        now_s,
        due_s,
        call.tpot_target_s,
        now_s,
        slo_class=call.slo_class,
        tenant=call.tenant,
    )
