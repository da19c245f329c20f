"""What an engine reports: one record a step, one a request, and many steps of one profile as arrays.

`StepRow`, `RequestRow` and `SampleRow` are the wire form (docs/files.md): the fields of telemetry files, milliseconds
where those have them. The rest is in the glossary's names, seconds and tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import BoolArray, FloatArray

IntArray = NDArray[np.int64]

StepKind = Literal["prefill", "decode", "mixed"]
STEP_KINDS: tuple[StepKind, ...] = ("prefill", "decode", "mixed")

RequestStatus = Literal["finished", "rejected", "failed", "unfinished"]
REQUEST_STATUSES: tuple[RequestStatus, ...] = ("finished", "rejected", "failed", "unfinished")

PHASES = ("", "idle", "context", "decode", "mixed")
"""What the engine did in the step before; '' = not recorded. `Steps.prev_phase` holds places in this tuple."""


EXCLUDED_FLAGS = ("outlier", "suspect", "composed", "context_not_recorded")
"""Flags whose steps are neither fitted, scored nor stored. `noisy` steps are kept."""


def excluded_by(flag: str) -> str | None:
    """Which part of a step's flag, if any, leaves it out.

    >>> excluded_by("sweep;outlier")
    'outlier'
    """
    return next((part for part in flag.split(";") if part in EXCLUDED_FLAGS), None) if flag else None


class StepRecord(msgspec.Struct, frozen=True, gc=False):
    """One engine step: what it held and how long it took. Tokens are sums over the requests of the step."""

    kind: StepKind
    step_s: float
    n_requests: int = 0
    """With prompt tokens in the step."""
    new_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """KV already there for those requests: prefix hits and earlier chunks."""
    batch_size: int = 0
    """Requests in decode."""
    sum_context_tokens: int = 0
    """Of the requests in decode."""
    prev_phase: str = ""
    run: str = ""
    noisy: bool = False
    ended_at_s: float = 0.0
    """UTC epoch seconds of its end; 0: not recorded."""


class RequestRecord(msgspec.Struct, frozen=True, gc=False):
    """One request as it met its instance, and its latency: TTFT, TPOT or both (None = not recorded)."""

    input_tokens: int
    prefix_hit_ratio: float
    kv_cache_usage: float
    requests_running: int
    requests_waiting: int
    prefill_tokens_in_flight: int
    decode_tokens_in_flight: int
    ttft_s: float | None
    tpot_s: float | None
    profile: Profile = Profile("", "")
    """Empty where it was not recorded."""
    run: str = ""


Word = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f]*$")]
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]*$")]
Id = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f]*$")]
Tokens = Annotated[int, Meta(ge=0, le=10**8)]
SumTokens = Annotated[int, Meta(ge=0, le=10**12)]
Requests = Annotated[int, Meta(ge=0, le=10**6)]
Parallel = Annotated[int, Meta(ge=1, le=10**4)]
Milliseconds = Annotated[float, Meta(gt=0, le=10**9)]


class StepRow(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One step as it is sent: the fields of a telemetry file. What it holds says its kind.

    Raises:
        ValueError: neither prompt tokens nor requests in decode. msgspec adds the place in the body.
    """

    gpu: Name
    model: Name
    latency_ms: Milliseconds
    precision: Word = ""
    tp: Parallel = 1
    ep: Parallel = 1
    engine: Word = ""
    run: Word = ""
    n_requests: Requests = 0
    new_tokens: Tokens = 0
    cached_tokens: SumTokens = 0
    batch_size: Requests = 0
    sum_context_tokens: SumTokens = 0
    prev_phase: Literal["", "idle", "context", "decode", "mixed"] = ""
    ended_at_s: Annotated[float, Meta(ge=0, le=10**11)] | None = None
    """UTC epoch seconds of its end; without it, its arrival here counts."""
    flag: Word = ""
    source: Word = ""
    """This field and those below are in files and taken, but not kept."""
    dp: Parallel | None = None
    kind: Word = ""
    seq: int | None = None
    mean_context_tokens: float | None = None
    next_phase: Word = ""
    queued_requests: int | None = None

    def __post_init__(self) -> None:
        if bool(self.n_requests) != bool(self.new_tokens):
            raise ValueError("n_requests and new_tokens belong together: both above 0 or both left out")
        if not self.new_tokens and not self.batch_size:
            raise ValueError("a step needs n_requests and new_tokens (prefill), batch_size (decode) or all three")

    @property
    def step_kind(self) -> StepKind:
        """Prefill, decode or both."""
        if not self.batch_size:
            return "prefill"
        return "mixed" if self.new_tokens else "decode"


class RequestRow(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One request that has ended: how it met its instance, what was predicted of it, and what came of it."""

    input_tokens: Tokens
    prefix_hit_ratio: Annotated[float, Meta(ge=0, le=1)]
    kv_cache_usage: Annotated[float, Meta(ge=0, le=1)]
    requests_running: Requests
    requests_waiting: Requests
    prefill_tokens_in_flight: SumTokens
    decode_tokens_in_flight: SumTokens
    ttft_ms: Milliseconds | None = None
    """Null: not recorded."""
    tpot_ms: Milliseconds | None = None
    predicted_ttft_ms: Milliseconds | None = None
    """At its arrival; null: nothing was predicted."""
    predicted_tpot_ms: Milliseconds | None = None
    model_version: Word = ""
    """Of the model that predicted."""
    output_tokens: Tokens | None = None
    request_id: Id = ""
    tenant: Word = ""
    slo_class: Word = ""
    gpu: Word = ""
    model: Word = ""
    precision: Word = ""
    tp: Parallel = 1
    ep: Parallel = 1
    engine: Word = ""
    trace: Word = ""
    """The recording it is from."""
    arrived_at_s: Annotated[float, Meta(ge=0, le=10**11)] | None = None
    """UTC epoch seconds of its arrival; without it, it is in no experiment and no figure over time."""
    status: RequestStatus = "finished"
    """All but finished ones missed their targets."""
    ttft_target_ms: Milliseconds | None = None
    """Null: no target."""
    tpot_target_ms: Milliseconds | None = None
    wait_ms: Annotated[float, Meta(ge=0, le=10**9)] | None = None
    """Arrival until its prefill began."""
    strategy: Word = ""
    """What decided about it, as `name@version`."""
    session: Word = ""
    """A salted hash of its session or key, for experiments that split sessions."""
    pool: Literal[0, 1] | None = None
    """Which of two pools served it, in an experiment between pools."""
    prefill_instance: Word = ""
    decode_instance: Word = ""
    seq: int | None = None
    """In files and taken, but not kept."""


Share = Annotated[float, Meta(ge=0, le=1)]
Total = Annotated[int, Meta(ge=0, le=10**15)]
Mean = Annotated[float, Meta(ge=0, le=10**9)]


class SampleRow(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What an instance said of itself at a moment, and what happened there since the sample before.

    Null: its engine does not say, or there is no sample before (the first one, and the first after a restart).
    """

    instance: Name
    at_s: Annotated[float, Meta(ge=0, le=10**11)]
    """UTC epoch seconds."""
    engine: Word = ""
    requests_running: Requests | None = None
    requests_waiting: Requests | None = None
    kv_cache_usage: Share | None = None
    interval_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None
    """Since the sample before; of this time are the figures below."""
    finished_requests: Total | None = None
    prompt_tokens: Total | None = None
    output_tokens: Total | None = None
    preemptions: Total | None = None
    prefix_hit_ratio: Share | None = None
    """Prompt tokens found in the prefix cache of those looked up."""
    kv_expired: Total | None = None
    """Requests whose KV was held for a decode instance that did not fetch it in time."""
    failed_transfers: Total | None = None
    ttft_ms: Mean | None = None
    """Mean of the requests that got their first token; the others likewise."""
    itl_ms: Mean | None = None
    e2e_ms: Mean | None = None
    decode_steps: Total | None = None
    decode_batch: Mean | None = None
    """Mean of the decode steps."""
    decode_step_ms: Mean | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """n steps of one profile and kind, one array a column, each (n,). The fields are those of `StepRecord`."""

    profile: Profile
    kind: StepKind
    step_s: FloatArray
    n_requests: FloatArray
    new_tokens: FloatArray
    cached_tokens: FloatArray
    batch_size: FloatArray
    sum_context_tokens: FloatArray
    prev_phase: IntArray
    run: IntArray
    """Which recording a step is from; equal numbers = the same one."""
    noisy: BoolArray
    ended_at_s: FloatArray
    """0 where it was not recorded."""

    def __len__(self) -> int:
        return len(self.step_s)

    def take(self, index: IntArray | BoolArray) -> "Steps":
        """The steps at `index` (places or a mask)."""
        columns: dict[str, Any] = {name: getattr(self, name)[index] for name in _COLUMNS}
        return replace(self, **columns)

    @staticmethod
    def joined(group: Sequence["Steps"]) -> "Steps":
        """Steps of one profile and kind, one group after the other."""
        columns: dict[str, Any] = {name: np.concatenate([getattr(s, name) for s in group]) for name in _COLUMNS}
        return replace(group[0], **columns)

    @staticmethod
    def of(profile: Profile, records: Sequence[StepRecord]) -> "Steps":
        """Records of one kind as arrays.

        >>> Steps.of(Profile("H100", "m"), [StepRecord("decode", 0.01, batch_size=4)]).batch_size.tolist()
        [4.0]
        """
        kinds = {r.kind for r in records}
        if len(kinds) != 1:
            raise ValueError(f"records of one kind are needed, these have {sorted(kinds) or 'none'}")

        def column(values: Iterable[float]) -> FloatArray:
            return np.fromiter(values, np.float64, len(records))

        return Steps(
            profile,
            records[0].kind,
            column(r.step_s for r in records),
            column(r.n_requests for r in records),
            column(r.new_tokens for r in records),
            column(r.cached_tokens for r in records),
            column(r.batch_size for r in records),
            column(r.sum_context_tokens for r in records),
            np.array([PHASES.index(r.prev_phase) for r in records], np.int64),
            np.unique(np.array([r.run for r in records], np.str_), return_inverse=True)[1].astype(np.int64),
            np.array([r.noisy for r in records], np.bool_),
            column(r.ended_at_s for r in records),
        )


_COLUMNS = tuple(f.name for f in fields(Steps) if f.name not in ("profile", "kind"))
