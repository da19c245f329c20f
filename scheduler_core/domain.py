"""The things that scheduling is about: profiles, instances, waiting and resident requests, and how long steps take.

Seconds and tokens throughout. Structs are frozen unless their docstring says who owns and updates them.
"""

import math
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from kairos.scheduler_core.slo import NO_TARGET_S

UNLIMITED_TOKENS = 2**62
"""A capacity, in tokens or requests, that nothing reaches."""

RequestId = int | str
"""Opaque. Within one queue all ids are of one type, since ties go to the lowest."""


class Profile(msgspec.Struct, frozen=True):
    """One combination of hardware and software: the unit for which step times are learned.

    >>> Profile(gpu="B300-SXM6", model="Qwen/Qwen3-32B", precision="bf16", tp=4, engine="vllm").profile_id
    'b300-sxm6_qwen-qwen3-32b_bf16_4_1_vllm'
    """

    gpu: str
    model: str
    precision: str = ""
    tp: int = 1
    ep: int = 1
    engine: str = ""

    @property
    def profile_id(self) -> str:
        """The six parts, lower-cased, anything but letters and digits turned into '-', joined by '_'."""
        parts = (self.gpu, self.model, self.precision, str(self.tp), str(self.ep), self.engine)
        return "_".join(re.sub(r"[^a-z0-9]+", "-", part.lower()) for part in parts)


class Part(NamedTuple):
    """The tokens of one request in one prefill step."""

    new_tokens: int
    context_tokens: int
    """Tokens already in the KV cache when the step starts: cached ones and those of earlier chunks."""


class Line(NamedTuple):
    """Coefficients of the linear step time; what they multiply differs between prefill and decode."""

    a_s: float
    b_s: float
    c_s: float


class StepTimes(Protocol):
    """How long the steps of one profile take. Implementations: `LinearStepTimes` and the trained predictor."""

    @property
    def prefill_line(self) -> Line:
        """The linear form nearest to the prefill step: a + sum(b*new + c*new*(context + new/2))."""
        ...

    @property
    def decode_line(self) -> Line:
        """The linear form nearest to the decode step: a + b*batch_size + c*sum_context_tokens."""
        ...

    def prefill_step_s(self, parts: Sequence[Part], noise: Sequence[float] | None = None) -> float:
        """Seconds of one prefill step; `noise` holds one factor a part (the simulator's)."""
        ...

    def remaining_prefill_s(self, new_tokens: int, context_tokens: int, chunk_tokens: int | None) -> float:
        """Seconds to compute `new_tokens` alone, in chunks of `chunk_tokens` (None = whole)."""
        ...

    def decode_step_s(self, batch_size: int, sum_context_tokens: int) -> float:
        """Seconds of one decode step of `batch_size` requests whose contexts sum to `sum_context_tokens`."""
        ...


class LinearStepTimes(msgspec.Struct, frozen=True):
    """Step times that are linear in the physical terms (docs/simulator.md, rules 1 and 2).

    >>> t = LinearStepTimes(prefill=Line(0.01, 1e-5, 0.0), decode=Line(0.005, 1e-4, 1e-8))
    >>> round(t.remaining_prefill_s(new_tokens=3000, context_tokens=0, chunk_tokens=2000), 6)
    0.05
    """

    prefill: Line
    decode: Line

    @property
    def prefill_line(self) -> Line:
        """The prefill coefficients."""
        return self.prefill

    @property
    def decode_line(self) -> Line:
        """The decode coefficients."""
        return self.decode

    def prefill_step_s(self, parts: Sequence[Part], noise: Sequence[float] | None = None) -> float:
        """a (with the first part's noise) plus each part's own work times its noise."""
        a_s, b_s, c_s = self.prefill
        if noise is None:
            return a_s + sum(b_s * new + c_s * new * (context + new / 2) for new, context in parts)
        work_s = sum(
            factor * (b_s * new + c_s * new * (context + new / 2))
            for factor, (new, context) in zip(noise, parts, strict=True)
        )
        return a_s * noise[0] + work_s

    def remaining_prefill_s(self, new_tokens: int, context_tokens: int, chunk_tokens: int | None) -> float:
        """The sum over the chunks still to run, so `a` counts once a chunk."""
        if new_tokens <= 0:
            return 0.0
        a_s, b_s, c_s = self.prefill
        chunks = 1 if chunk_tokens is None else -(-new_tokens // chunk_tokens)
        return chunks * a_s + b_s * new_tokens + c_s * new_tokens * (context_tokens + new_tokens / 2)

    def decode_step_s(self, batch_size: int, sum_context_tokens: int) -> float:
        """a + b*B + c*S."""
        a_s, b_s, c_s = self.decode
        return a_s + b_s * batch_size + c_s * sum_context_tokens


def saturation_knee_tokens(line: Line) -> int:
    """The smallest prefill step whose fixed cost is at most a tenth of it (docs/policies.md, `on-time` point 4).

    >>> saturation_knee_tokens(Line(8.2e-3, 1.48e-5, 3.9e-10))
    4696
    """
    a_s, b_s, c_s = line
    if a_s <= 0:
        return 0
    if c_s <= 0:
        return math.ceil(9 * a_s / b_s) if b_s > 0 else 2**62
    return math.ceil((-b_s + math.sqrt(b_s * b_s + 18 * a_s * c_s)) / c_s)


class Control(StrEnum):
    """Where Kairos sits, and so which of its decisions take effect (docs/simulator.md, last section)."""

    ENGINE = "engine"
    GATEWAY = "gateway"
    GATEWAY_PRIORITY = "gateway+priority"

    @property
    def capabilities(self) -> "Capabilities":
        """What can be carried out there."""
        return _CAPABILITIES[self]


class Capabilities(msgspec.Struct, frozen=True):
    """Which decisions take effect at an instance."""

    preempt: bool
    """a running prefill yields at a chunk end"""
    pack: bool
    """Kairos chooses which prompts share a step"""
    decode_admission: bool
    """Kairos chooses which ready requests join the decode batch"""
    participation: bool
    """Kairos chooses which residents take part in a decode step"""


_CAPABILITIES = {
    Control.ENGINE: Capabilities(preempt=True, pack=True, decode_admission=True, participation=True),
    Control.GATEWAY: Capabilities(preempt=False, pack=False, decode_admission=False, participation=False),
    Control.GATEWAY_PRIORITY: Capabilities(preempt=False, pack=False, decode_admission=False, participation=False),
}


class PrefillInstance(msgspec.Struct, frozen=True):
    """A running engine that computes prompts."""

    instance_id: str
    step_times: StepTimes
    chunk_tokens: int | None = None
    """Token budget of one step; None = whole prompts."""
    max_requests_per_step: int = 1
    control: Control = Control.ENGINE


class DecodeInstance(msgspec.Struct, frozen=True):
    """A running engine that produces the tokens after the first."""

    instance_id: str
    step_times: StepTimes
    max_batch: int = 64
    """The cap that `continuous` and `capped` keep."""
    kv_tokens: int = UNLIMITED_TOKENS
    batch_limit: int = UNLIMITED_TOKENS
    """What the engine can hold at all."""
    control: Control = Control.ENGINE


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """A request whose prompt is not (wholly) computed yet, as one prefill instance or queue sees it."""

    request_id: RequestId
    arrival_s: float
    prompt_tokens: int
    ttft_target_s: float
    deadline_s: float
    """arrival + TTFT target."""
    prefill_s: float
    """Predicted remaining prefill seconds on the instance that asks (median)."""
    total_prefill_s: float
    """The same for the whole prompt."""
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    """Tokens computed by earlier chunks, beyond the cached ones."""
    slo_class: str = "default"
    tenant: str = ""
    weight: float = 1.0

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to compute."""
        return self.prompt_tokens - self.cached_tokens - self.prefilled_tokens

    @property
    def context_tokens(self) -> int:
        """Tokens already in the KV cache."""
        return self.cached_tokens + self.prefilled_tokens


class Resident(msgspec.Struct, gc=False):
    """A request in decode, ready or resident. Owned and updated in place by its instance; policies only read it."""

    request_id: RequestId
    context_tokens: int
    output_tokens: int
    """Emitted so far, the first one included."""
    first_token_s: float
    due_s: float
    """When its next token is due: first token + output_tokens x TPOT target; inf without a target."""
    tpot_target_s: float = NO_TARGET_S
    ready_s: float = 0.0
    """When its KV was there."""
    last_token_s: float = 0.0
    """When its newest token came."""
    slo_class: str = "default"
    tenant: str = ""
