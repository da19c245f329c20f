"""Bodies of the managed form and of the live fleet."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kairos.scheduler_core.domain import Control
from kairos.scheduler_core.service.managed.reservation import Stage

_TEXT = r"^[^\x00-\x1f]*$"
Id = Annotated[str, Field(min_length=1, max_length=256, pattern=_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=_TEXT)]
Word = Annotated[str, Field(max_length=128, pattern=_TEXT)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=10**8)]
SomeTokens = Annotated[int, Field(strict=True, ge=1, le=10**8)]
Capacity = Annotated[int, Field(strict=True, ge=1, le=2**53)]
Target = Annotated[float, Field(strict=True, gt=0, le=10**6)]
Epoch = Annotated[float, Field(strict=True, ge=0, le=10**11)]


class Strict(BaseModel):
    """A body: a field that is not named here is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Announcement(Strict):
    """A request that is about to be sent. Lengths alone, never its content."""

    request_id: Id
    """The same id with the same body is answered as before, with another body refused (409)."""
    prompt_tokens: SomeTokens
    cached_tokens: Tokens = 0
    """Of the prompt, in the KV cache of every instance; one at least is computed."""
    cached_tokens_by_instance: Annotated[dict[Name, Tokens], Field(max_length=1024)] = {}
    model: Word = ""
    """Empty: any instance will do."""
    slo_class: Word = "default"
    ttft_target_s: Target | None = None
    """Null: that of its class."""
    tpot_target_s: Target | None = None
    tenant: Word = ""
    arrival_s: Epoch | None = None
    """UTC epoch seconds; null: now."""
    ttl_s: Annotated[float, Field(strict=True, gt=0, le=86_400)] | None = None
    """Without an event for so long, the reservation expires; null: `managed.ttl_s`."""

    @model_validator(mode="after")
    def _something_is_computed(self) -> Self:
        if max([self.cached_tokens, *self.cached_tokens_by_instance.values()]) >= self.prompt_tokens:
            raise ValueError("cached tokens leave none of the prompt to compute; leave one at least")
        return self


class Reserved(BaseModel):
    """Where an announced request goes."""

    request_id: str
    prefill_instance: str
    decode_instance: str | None
    """Null: the fleet has no decode instances."""
    prefill_url: str | None
    decode_url: str | None
    predicted_prefill_s: float
    """Of its prompt, alone."""
    predicted_ttft_s: float
    """Arrival to first token, behind what its instance has."""
    predicted_tpot_s: float | None
    on_time: bool
    ttl_s: float
    """Without an event for so long it expires."""
    decision_id: str
    strategy: str
    model_version: str
    stored: bool
    """False: the database is away; it counts here, and other replicas and a restart learn of it once it is back."""


class Reported(Strict):
    """Something that happened to an announced request. Events may come twice and in any order."""

    event: Literal["prefill_started", "first_token", "transferred", "tokens", "finished", "failed"]
    at_s: Epoch | None = None
    """UTC epoch seconds; null: now."""
    output_tokens: SomeTokens | None = None
    """Emitted so far; needed for `tokens`."""

    @model_validator(mode="after")
    def _tokens_say_how_many(self) -> Self:
        if self.event == "tokens" and self.output_tokens is None:
            raise ValueError("output_tokens is needed for the event tokens")
        return self


class ReservationState(BaseModel):
    """How far a request has come."""

    request_id: str
    stage: Stage
    ended: Literal["finished", "failed", "released", "instance_gone", "expired"] | None
    output_tokens: int
    expires_at_s: float
    stored: bool


class InstanceBody(Strict):
    """A running engine of the live fleet."""

    role: Literal["prefill", "decode"]
    profile: Name
    """A name in the configuration or a profile id; otherwise the closest profile is taken."""
    serves: Annotated[list[Name], Field(max_length=256)] = []
    """Models it answers to; empty: the profile's model."""
    control: Control = Control.GATEWAY
    url: Annotated[str, Field(max_length=1024, pattern=r"^(dns\+)?https?://[!-~]+$")] | None = None
    """With it, the instance gets traffic while `GET url/health` is good; without, at once."""
    chunk_tokens: SomeTokens | None = None
    max_requests_per_step: Annotated[int, Field(strict=True, ge=1, le=10**6)] = 1
    max_batch: Capacity = 64
    batch_limit: Capacity | None = None
    kv_tokens: Capacity | None = None


class InstanceState(BaseModel):
    """An instance of the live fleet."""

    instance_id: str
    state: Literal["new", "active", "unhealthy", "draining"]
    """Only active ones get new requests; new: its address was not good yet."""
    gone_at_s: float | None
    """UTC epoch seconds: it is being removed, and what is left there then ends as instance_gone."""
    source: Literal["configuration", "rest"]
    reservations: int
    told: InstanceBody


class InstanceList(BaseModel):
    """The live fleet."""

    instances: list[InstanceState]
