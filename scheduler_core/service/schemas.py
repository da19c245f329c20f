"""Bodies of the REST API. `/schedule` is msgspec (it is called for every decision), the rest pydantic.

Times are seconds, lengths tokens. `now_s` and every other time of a snapshot share one origin, whichever it is.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from pydantic import BaseModel

from kairos.scheduler_core.decision import Reason, Standing
from kairos.scheduler_core.domain import Control
from kairos.scheduler_core.telemetry import RequestRow, SampleRow, StepRow

_MOST_TOKENS = 10**8
_MOST_SECONDS = 10**11

Id = Annotated[str, Meta(min_length=1, max_length=256)] | Annotated[int, Meta(ge=0, le=2**53)]
"""Of a request: text or a number, all of one kind within a snapshot; ties go to the lowest."""
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=256)]
Time = Annotated[float, Meta(ge=-_MOST_SECONDS, le=_MOST_SECONDS)]
Seconds = Annotated[float, Meta(ge=0, le=_MOST_SECONDS)]
Target = Annotated[float, Meta(gt=0, le=10**9)]
Tokens = Annotated[int, Meta(ge=0, le=_MOST_TOKENS)]
SomeTokens = Annotated[int, Meta(ge=1, le=_MOST_TOKENS)]
Capacity = Annotated[int, Meta(ge=1, le=2**53)]

# -- in --------------------------------------------------------------------------------------------------------------


class Strict(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Base of everything in a snapshot: a field that is not named here is an error."""


class Instance(Strict, frozen=True, gc=False):
    """A running engine."""

    instance_id: Name
    role: Literal["prefill", "decode"]
    profile: Annotated[
        Name, Meta(description="A name in the configuration or a profile id; otherwise the closest profile is taken.")
    ]
    serves: Annotated[list[Name], Meta(description="Models it answers to; empty: the profile's model.")] = []
    control: Annotated[Control, Meta(description="Which of the decisions can be carried out there.")] = Control.ENGINE
    free_in_s: Annotated[
        Seconds | None,
        Meta(description="Until its step in flight ends; 0 = idle. Left out: predicted from what runs there."),
    ] = None
    chunk_tokens: Annotated[
        SomeTokens | None, Meta(description="Prefill: token budget of one step; null = whole prompts.")
    ] = None
    max_requests_per_step: Annotated[
        Annotated[int, Meta(ge=1, le=10**6)], Meta(description="Prefill: requests that may share a step.")
    ] = 1
    max_batch: Annotated[Capacity, Meta(description="Decode: the cap of the policies continuous and capped.")] = 64
    batch_limit: Annotated[
        Capacity | None, Meta(description="Decode: what the engine can hold at all; null = no limit.")
    ] = None
    kv_tokens: Annotated[Capacity | None, Meta(description="Decode: KV capacity; null = no limit.")] = None


class WaitingRequest(Strict, frozen=True, gc=False):
    """A request whose prompt is not wholly computed and that is in no step now."""

    request_id: Id
    arrival_s: Time
    prompt_tokens: SomeTokens
    cached_tokens: Annotated[Tokens, Meta(description="Of the prompt, in the KV cache of every instance.")] = 0
    cached_tokens_by_instance: Annotated[
        dict[str, Tokens], Meta(description="The same by instance; those not named take cached_tokens.")
    ] = {}
    prefilled_tokens: Annotated[
        Tokens, Meta(description="Computed by earlier chunks, beyond the cached ones; needs instance_id.")
    ] = 0
    instance_id: Annotated[Name | None, Meta(description="The instance it is bound to; null: not bound yet.")] = None
    decode_instance_id: Annotated[
        Name | None, Meta(description="Where it was placed at dispatch, if it was: it counts as load there.")
    ] = None
    admitted: Annotated[
        bool, Meta(description="True: it was taken before; admission is not asked again. Bound ones count as taken.")
    ] = False
    model: Annotated[Text, Meta(description="Empty: any instance will do.")] = ""
    slo_class: Annotated[Text, Meta(description="Of the configuration; gives the targets not given here.")] = "default"
    ttft_target_s: Target | None = None
    tpot_target_s: Target | None = None
    tenant: Text = ""
    weight: Annotated[Annotated[float, Meta(gt=0, le=10**6)], Meta(description="What serving it in time is worth.")] = (
        1.0
    )


class RunningRequest(Strict, frozen=True, gc=False):
    """A request in the prefill step that its instance runs now."""

    request_id: Id
    instance_id: Name
    arrival_s: Time
    prompt_tokens: SomeTokens
    cached_tokens: Tokens = 0
    prefilled_tokens: Annotated[Tokens, Meta(description="Computed before the step in flight.")] = 0
    step_tokens: Annotated[
        SomeTokens | None,
        Meta(description="Its tokens in the step in flight; null: all that are left, up to chunk_tokens."),
    ] = None
    decode_instance_id: Annotated[
        Name | None, Meta(description="Where it was placed at dispatch, if it was: it counts as load there.")
    ] = None
    slo_class: Text = "default"
    ttft_target_s: Target | None = None
    tenant: Text = ""
    weight: Annotated[float, Meta(gt=0, le=10**6)] = 1.0


class TransferredRequest(Strict, frozen=True, gc=False):
    """A request that has left prefill and is not in a decode batch: its KV is there, on its way, or swapped out.

    Those with an instance are listed in the order in which they wait there: swapped-out ones first, then by readiness.
    """

    request_id: Id
    context_tokens: Annotated[SomeTokens, Meta(description="Prompt and tokens emitted so far (at least prompt + 1).")]
    first_token_s: Annotated[Time | None, Meta(description="Needed unless output_tokens is 0.")] = None
    output_tokens: Annotated[
        Tokens, Meta(description="Emitted so far, the first one included; 0 where decode emits the first.")
    ] = 1
    arrival_s: Annotated[Time | None, Meta(description="Needed when output_tokens is 0.")] = None
    ready_s: Annotated[
        Time | None, Meta(description="When its KV is at decode; later than now_s: in transfer. Left out: now.")
    ] = None
    last_token_s: Annotated[Time | None, Meta(description="When its newest token came; null: just now.")] = None
    instance_id: Annotated[Name | None, Meta(description="Decode instance it was placed on; null: to be placed.")] = (
        None
    )
    model: Text = ""
    slo_class: Text = "default"
    ttft_target_s: Target | None = None
    tpot_target_s: Target | None = None
    tenant: Text = ""


class ResidentRequest(Strict, frozen=True, gc=False):
    """A request in a decode batch; listed in the order of admission."""

    request_id: Id
    instance_id: Name
    context_tokens: SomeTokens
    first_token_s: Annotated[Time | None, Meta(description="Needed unless output_tokens is 0.")] = None
    output_tokens: Tokens = 1
    arrival_s: Annotated[Time | None, Meta(description="Needed when output_tokens is 0.")] = None
    last_token_s: Annotated[Time | None, Meta(description="When its newest token came; null: just now.")] = None
    slo_class: Text = "default"
    ttft_target_s: Target | None = None
    tpot_target_s: Target | None = None
    tenant: Text = ""


class EndedStep(Strict, frozen=True, gc=False):
    """A step that ended since the last answer: what policies with memory and the share guard learn from."""

    instance_id: Name
    seconds: Annotated[float, Meta(gt=0, le=10**6)]
    new_tokens: Annotated[Tokens, Meta(description="Prefill: tokens computed.")] = 0
    batch_size: Annotated[Tokens, Meta(description="Decode: participants.")] = 0
    sum_context_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=10**12)], Meta(description="Decode: their contexts before the step, summed.")
    ] = 0
    longest_context_tokens: Annotated[Tokens, Meta(description="Decode: the longest of them.")] = 0


class Snapshot(Strict, frozen=True, gc=False):
    """A fleet and its requests at one instant."""

    instances: Annotated[list[Instance], Meta(max_length=1024)]
    waiting: list[WaitingRequest] = []
    running: list[RunningRequest] = []
    transferred: list[TransferredRequest] = []
    resident: list[ResidentRequest] = []
    now_s: Annotated[
        Time | None, Meta(description="The instant. Left out: the server's clock (UTC epoch seconds).")
    ] = None
    strategy: Annotated[
        Annotated[str, Meta(min_length=1, max_length=1024)] | None,
        Meta(
            description="A strategy of the configuration, or PREFILL+PREFILL_PLACEMENT+DECODE_PLACEMENT+DECODE"
            "[+ADMISSION] of installed policies. Left out: the active strategy."
        ),
    ] = None
    state: Annotated[
        Annotated[str, Meta(max_length=2**24)] | None, Meta(description="`state` of the last answer, as it came.")
    ] = None
    ended_steps: list[EndedStep] = []


# -- out -------------------------------------------------------------------------------------------------------------


class PrefillReason(msgspec.Struct, frozen=True, gc=False):
    """Why a waiting request stands where it does, in numbers."""

    code: Standing
    chosen_by: Annotated[
        Reason | None, Meta(description="What put it into the next step of its instance; null: it is not in it.")
    ]
    waited_s: float
    laxity_s: Annotated[
        float | None,
        Meta(description="Deadline - now - predicted remaining prefill seconds; negative = lost; null: no target."),
    ]
    ahead_requests: Annotated[int, Meta(description="That its instance runs before it.")]
    ahead_s: Annotated[float, Meta(description="Predicted seconds until it starts.")]


class PrefillAnswer(msgspec.Struct, frozen=True, gc=False):
    """Where a waiting request will run, in which place, and when its first token is predicted."""

    request_id: Id
    instance_id: Annotated[str, Meta(description="Under late binding: the one that will be free for it first.")]
    order: Annotated[int, Meta(ge=0, description="Its place among the waiting requests of that instance, from 0.")]
    step_tokens: Annotated[
        int, Meta(ge=0, description="Its tokens in the next step of an idle instance; 0: it is not in that step.")
    ]
    predicted_prefill_s: Annotated[float, Meta(ge=0, description="What is left of its prompt, alone.")]
    predicted_ttft_s: float
    ttft_deadline_s: Annotated[float | None, Meta(description="Null: no target.")]
    on_time: bool
    reason: PrefillReason


class DecodeCode(StrEnum):
    """What a decode decision came from."""

    POLICY = "policy"
    FALLBACK = "fallback"
    NOT_CONTROLLED = "not_controlled"
    IDLE = "idle"


class DecodeReason(msgspec.Struct, frozen=True, gc=False):
    """What the decision was made from."""

    code: Annotated[
        DecodeCode,
        Meta(
            description="policy; fallback: the policy failed, everyone who fits instead; not_controlled: the engine "
            "batches by itself, this is what continuous batching does; idle: nobody is there"
        ),
    ]
    resident_requests: int
    ready_requests: Annotated[int, Meta(description="Placed there, KV there, not in the batch.")]
    sum_context_tokens: Annotated[int, Meta(description="Of the residents, before the decision.")]
    tightest_tpot_s: Annotated[float | None, Meta(description="Smallest target of residents; null: none.")]


class DecodeAnswer(msgspec.Struct, frozen=True, gc=False):
    """What a decode instance does next: swap out, admit, step, in that order."""

    instance_id: str
    swap_out: list[Id]
    admit: list[Id]
    step: Annotated[list[Id], Meta(description="Participants of the step, admitted ones included.")]
    predicted_step_s: Annotated[float | None, Meta(description="Null: no step.")]
    reason: DecodeReason


class Placement(msgspec.Struct, frozen=True, gc=False):
    """The decode instance of a request."""

    request_id: Id
    instance_id: str


class Rejection(msgspec.Struct, frozen=True, gc=False):
    """A request that is not taken."""

    request_id: Id
    status: Annotated[int, Meta(description="HTTP status to answer it with: 404, 429 or 503.")]
    reason: str
    retry_after_s: Annotated[int | None, Meta(description="Null: coming back does not help.")]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The decisions."""

    decision_id: Annotated[str, Meta(description="Of the snapshot: the same one has the same id.")]
    strategy: str
    prefill: Annotated[list[PrefillAnswer], Meta(description="Every waiting request that is not rejected.")]
    decode: Annotated[list[DecodeAnswer], Meta(description="Every decode instance.")]
    placements: Annotated[list[Placement], Meta(description="Requests that got a decode instance now.")]
    rejected: list[Rejection]
    model_versions: Annotated[
        dict[str, str], Meta(description="Where step times come from, by profile: linear, a model's id, or a prior.")
    ]
    warnings: list[str]
    state: Annotated[str, Meta(description="To be handed back with the next snapshot.")]


# -- telemetry -------------------------------------------------------------------------------------------------------

BatchId = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]*$")]


class StepsBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Steps with the id of their batch."""

    rows: list[StepRow]
    batch_id: BatchId | None = None


class RequestsBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Requests with the id of their batch."""

    rows: list[RequestRow]
    batch_id: BatchId | None = None


class SamplesBody(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Samples of instances with the id of their batch."""

    rows: list[SampleRow]
    batch_id: BatchId | None = None


class RowsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any of them, its rows not looked at yet."""

    rows: list[msgspec.Raw]
    batch_id: BatchId | None = None


# -- errors ----------------------------------------------------------------------------------------------------------


class FieldProblem(msgspec.Struct, frozen=True):
    """What is wrong with one field."""

    path: Annotated[str, Meta(examples=["waiting[3].prompt_tokens"])]
    message: str


class Problem(msgspec.Struct, frozen=True):
    """An error (RFC 9457)."""

    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
    type: str = "about:blank"


class TelemetryAnswer(msgspec.Struct, frozen=True):
    """What became of a batch: stored means committed."""

    batch_id: str
    stored: Annotated[int, Meta(description="Rows that are in the database.")]
    rejected: Annotated[int, Meta(description="Rows that do not fit; `errors` names the first 1,000.")]
    excluded: Annotated[dict[str, int], Meta(description="Rows left out for their flag, by flag.")]
    duplicate: Annotated[bool, Meta(description="The batch was stored before, nothing was stored now.")]
    errors: list[FieldProblem]
    buffered: Annotated[int, Meta(description="Rows that wait in memory (202); lost if the service ends first.")] = 0


# -- control routes --------------------------------------------------------------------------------------------------


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Reloaded(BaseModel):
    """The last configuration that was read while the service ran."""

    at: datetime
    taken: bool
    """False: it was refused, the one before is in force; the log and the events say why."""


class Readiness(BaseModel):
    """What it would decide with, and what it cannot do now."""

    status: Literal["ready", "draining"]
    """Draining (503): it is about to end and takes requests for a moment only."""
    model_versions: dict[str, str]
    """Where step times come from, by profile."""
    model_age_s: dict[str, float]
    """By profile id: since the last good fit of the promoted model."""
    database: Literal["none", "ready", "away"]
    """Away: decisions go on with what was last seen."""
    lost: list[str]
    """What does not work now."""
    last_reload: Reloaded | None
