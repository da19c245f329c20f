"""`Settings`: everything that kairos.yaml may say (docs/configuration.md names every setting)."""

import ipaddress
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    IPvAnyNetwork,
    JsonValue,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from kairos.scheduler_core.domain import Control, Line, LinearStepTimes, Profile
from kairos.scheduler_core.errors import UnknownNameError, UnknownProfileError
from kairos.scheduler_core.plugins import POLICY_KINDS
from kairos.scheduler_core.strategy import PolicyChoice, Strategy

Loc = tuple[int | str, ...]
"""The way to a setting: names and list indices."""

# -- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: object) -> object:
    """A YAML 1.1 reader hands over 1e-08 and 25.0e9 as text, and so does the environment."""
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number is expected") from None
    return value


def _whole(value: object) -> object:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


Number = Annotated[float, BeforeValidator(_number), AllowInfNan(False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
NotNegativeCount = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=65535)]

InstanceRole = Literal["prefill", "decode", "mixed"]
INSTANCE_ROLES: tuple[InstanceRole, ...] = get_args(InstanceRole)


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine can reach.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Section(BaseModel):
    """A part of the settings; an unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def _refuse(problems: Iterable[tuple[Loc, str]]) -> None:
    """Raise what is wrong, if anything, each at its place below the section that is being validated."""
    details = [
        InitErrorDetails(type=PydanticCustomError("kairos", "{text}", {"text": text}), loc=loc, input=None)
        for loc, text in problems
    ]
    if details:
        raise ValidationError.from_exception_data("settings", details)


# -- profiles --------------------------------------------------------------------------------------------------------


class LineSettings(Section):
    """Coefficients of a linear step time."""

    a_s: NotNegative = 0.0
    b_s: NotNegative = 0.0
    c_s: NotNegative = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> "LineSettings":
        if self.a_s + self.b_s + self.c_s <= 0:
            raise ValueError("a step must take time; give at least one of a_s, b_s, c_s above 0")
        return self

    def as_line(self) -> Line:
        """The same for the formulas."""
        return Line(self.a_s, self.b_s, self.c_s)


class LinearSettings(Section):
    """Prefill: a + sum(b*new + c*new*(context + new/2)); decode: a + b*batch + c*sum of contexts."""

    prefill: LineSettings
    decode: LineSettings

    def as_step_times(self) -> LinearStepTimes:
        """The step times that these coefficients mean."""
        return LinearStepTimes(prefill=self.prefill.as_line(), decode=self.decode.as_line())


class StepTimesSettings(Section):
    """Where the step times of a profile come from: coefficients or a trained model, one of the two."""

    linear: LinearSettings | None = None
    model: str | None = None
    """Path of a trained model, from the folder of the file or the current one."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "StepTimesSettings":
        if (self.linear is None) == (self.model is None):
            raise ValueError("give either linear or model; leave step_times out for the prior of the closest profile")
        return self


class ProfileSettings(Section):
    """One combination of hardware and software."""

    gpu: str
    model: str
    precision: str = ""
    tp: Count = 1
    ep: Count = 1
    engine: str = ""
    step_times: StepTimesSettings | None = None
    """None: the prior of the closest profile."""

    def as_profile(self) -> Profile:
        """The key under which step times are learned."""
        return Profile(self.gpu, self.model, self.precision, self.tp, self.ep, self.engine)


# -- fleet -----------------------------------------------------------------------------------------------------------


class Group(Section):
    """Instances that are alike."""

    count: Count = 1
    profile: str
    """A name in `profiles`."""
    serves: tuple[str, ...] = ()
    """Names of the models it answers to; empty: the profile's model."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters, served under their own names."""
    control: Control = Control.ENGINE
    url: Annotated[str, Field(pattern=r"^(dns\+)?https?://\S+$")] | None = None
    """Address of a live worker."""
    engine: Literal["vllm", "sglang"] | None = None
    """What answers at `url`; None: it is asked."""
    forward_pass: Annotated[str, Field(pattern=r"^(tcp|ipc)://\S+$")] | None = None
    """Where it publishes forward-pass metrics (docs/telemetry.md)."""
    key: SecretStr | None = None
    """What the gateway says to it as a bearer key; never shown."""
    key_file: Path | None = None
    """A file that holds the key instead."""

    @model_validator(mode="after")
    def _an_address_is_one_instance(self) -> "Group":
        if self.url is not None and self.count > 1:
            raise ValueError("an address is one instance; write one group for each, or dns+http://name:port")
        if self.key is not None and self.key_file is not None:
            raise ValueError("give either key or key_file")
        return self


class ComputesPrompts(Group):
    """What prefill and mixed instances have in common."""

    chunk_tokens: Count | None = None
    """Token budget of one step; None: whole prompts."""
    max_requests_per_step: Count = 1
    in_flight: Count = 2
    """Prompts that the gateway sends before the first of them is done; the others wait in Kairos."""
    prefix_cache: bool = False
    kv_tokens: Count | None = None
    """Capacity of the prefix cache; of a mixed instance the KV capacity. None: no limit."""
    kv_events_port: Port | None = None
    """Where it publishes KV events over ZMQ, on the host of `url`; None: it does not."""
    kv_replay_port: Port | None = None
    """Where it sends earlier ones again; None: nowhere."""

    @model_validator(mode="after")
    def _a_cache_has_a_size(self) -> "ComputesPrompts":
        if self.prefix_cache and self.kv_tokens is None:
            raise ValueError("prefix_cache needs kv_tokens, the capacity of the cache")
        return self

    @model_validator(mode="after")
    def _a_replay_is_of_events(self) -> "ComputesPrompts":
        if self.kv_replay_port is not None and self.kv_events_port is None:
            raise ValueError("kv_replay_port needs kv_events_port, where the events are published")
        return self


class HandsOver(Group):
    """What prefill and decode instances have in common."""

    connector: Literal["nixl", "mooncake"] = "nixl"
    """How vLLM hands KV over; SGLang has one way."""


class PrefillGroup(ComputesPrompts, HandsOver):
    """Instances that compute prompts."""

    kv_held_tokens: Count | None = None
    """Limit of the KV held for transfer; None: none, prefill never waits for decode."""
    bootstrap_port: Port = 8998
    """Where decode instances ask it for KV (SGLang, Mooncake)."""


class MixedGroup(ComputesPrompts):
    """Instances that do both themselves, behind the gateway only."""

    max_batch: Count = 64
    batch_limit: Count | None = None


class DecodeGroup(HandsOver):
    """Instances that produce the tokens after the first."""

    max_batch: Count = 64
    """The cap that the policies continuous and capped keep."""
    batch_limit: Count | None = None
    """What the engine can hold at all; None: no limit."""
    kv_tokens: Count | None = None
    """KV capacity; None: no limit."""
    swap_out: Literal["free", "recompute"] = "free"
    """What it costs to bring a swapped-out request back."""


class KvTransfer(Section):
    """latency_s + prompt tokens x bytes_per_token / bytes_per_s."""

    bytes_per_token: NotNegative = 0.0
    bytes_per_s: Positive = 25e9
    latency_s: NotNegative = 0.0
    contention: bool = False
    """Whether the transfers that leave one prefill instance at a time share its bandwidth."""


class Handover(Section):
    """How a request goes from prefill to decode (docs/simulator.md, rule 3)."""

    first_token: Literal["prefill", "decode"] = "prefill"
    place_decode: Literal["at_ready", "at_first_token", "at_dispatch"] = "at_ready"


class Fleet(Section):
    """The instances."""

    prefill: tuple[PrefillGroup, ...] = ()
    decode: tuple[DecodeGroup, ...] = ()
    mixed: tuple[MixedGroup, ...] = ()
    kv_transfer: KvTransfer = KvTransfer()
    handover: Handover = Handover()

    @field_validator("prefill", "decode", "mixed", mode="before")
    @classmethod
    def _null_is_empty(cls, groups: object) -> object:
        return () if groups is None else groups

    @model_validator(mode="after")
    def _both_roles(self) -> "Fleet":
        _refuse(
            ((role,), f"a fleet needs at least one {role} instance")
            for role in ("prefill", "decode")
            if not getattr(self, role) and not (self.mixed and not self.prefill and not self.decode)
        )
        return self

    def groups(self) -> Iterator[tuple[InstanceRole, int, Group]]:
        """Every group with its role and its place among those of the role."""
        for role in INSTANCE_ROLES:
            for index, group in enumerate(getattr(self, role)):
                yield role, index, group


# -- promises, guards, strategies, service ---------------------------------------------------------------------------


class SloClass(Section):
    """A promise; None: no target."""

    ttft_s: Positive | None = 2.0
    tpot_s: Positive | None = 0.05


class SloSettings(Section):
    """The promises by name; requests without a class take `default`, which is always there."""

    classes: dict[str, SloClass] = {"default": SloClass()}

    @field_validator("classes", mode="after")
    @classmethod
    def _with_default(cls, classes: dict[str, SloClass]) -> dict[str, SloClass]:
        return {"default": SloClass()} | classes


class Guards(Section):
    """Limits around every policy."""

    deferred_share: Annotated[NotNegative, Field(le=1)] = 0.05
    """Share of prefill time that lost and deferred requests are sure of; 0 switches the guard off."""
    decision_budget_s: Positive = 0.05
    """A decision that takes longer counts as failed."""


class PolicySlot(Section):
    """A policy and its parameters; in the file a name, or a mapping with `name` and the parameters beside it."""

    name: str
    params: dict[str, JsonValue] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "params" not in value:
            params = {key: _plain(item) for key, item in value.items() if key != "name"}
            return {key: item for key, item in value.items() if key == "name"} | {"params": params}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        name = {"type": "string", "description": "A policy's name, or module:Class."}
        mapping = {"type": "object", "properties": {"name": name}, "required": ["name"], "additionalProperties": True}
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [name, mapping]}


def _plain(value: object) -> object:
    """A parameter with numbers as numbers, however they were written."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else value


class StrategySettings(Section):
    """A named bundle of policies. Names are checked where policies are loaded, not here."""

    prefill: PolicySlot
    prefill_placement: PolicySlot
    decode_placement: PolicySlot
    decode: PolicySlot
    admission: PolicySlot = PolicySlot(name="accept-all")

    def as_strategy(self, name: str) -> Strategy:
        """The bundle under its name; its policies are not looked up yet."""
        choices = {
            kind: PolicyChoice(slot.name, dict(slot.params))
            for kind in POLICY_KINDS
            if isinstance(slot := getattr(self, kind), PolicySlot)
        }
        return Strategy(name, **choices)


class ServiceSettings(Section):
    """The control plane."""

    host: str = "127.0.0.1"
    port: Port = 8011
    max_requests: Count = 20_000
    """Requests in one snapshot; more is answered 413."""
    max_body_bytes: Count = 64 * 2**20
    clock_scale: Annotated[Positive, Field(le=3600)] = 1.0
    """How much faster than real time experiments run; for a simulated fleet, which must have the same."""
    schedule_key: SecretStr | None = None
    """What schedules of experiments are signed with; None: a key is drawn for each experiment and kept in the store."""
    client_timeout_s: Positive = 30.0
    """How long a client may take to send the head of a request, and then its body."""
    log_format: Literal["json", "text"] = "json"
    drain_s: Positive = 20.0
    """From SIGTERM until the process has ended."""
    drain_notice_s: NotNegative = 2.0
    """How much of that requests are still taken, while /readyz says that no more should come."""

    @model_validator(mode="after")
    def _notice_within_the_drain(self) -> "ServiceSettings":
        if self.drain_notice_s >= self.drain_s:
            _refuse([(("drain_notice_s",), f"must be below drain_s, {self.drain_s:g}")])
        return self


Role = Literal["read", "schedule", "operate"]
ROLES: tuple[Role, ...] = ("read", "schedule", "operate")
"""What the holder of a key may do; each may also do what those before it may."""
_LEAST_KEY_CHARACTERS = 32


class AccessKey(Section):
    """A bearer key for a service without a database, or for its first caller."""

    key: SecretStr
    """Random, at least 32 characters; never shown."""
    role: Role
    tenant: str | None = None
    """Whose requests it is for; None: everyone's."""

    @model_validator(mode="after")
    def _long_enough(self) -> "AccessKey":
        if len(self.key.get_secret_value()) < _LEAST_KEY_CHARACTERS:
            _refuse([(("key",), f"needs at least {_LEAST_KEY_CHARACTERS} random characters")])
        return self


class AccessSettings(Section):
    """Who may call the service, beside the keys that the database holds."""

    keys: dict[str, AccessKey] = {}
    """By the name of whoever holds it."""


class GatewayKey(Section):
    """Who may use the gateway, and as whom."""

    key: SecretStr
    """The bearer key; never shown."""
    tenant: str
    classes: tuple[str, ...] = ()
    """SLO classes that its requests may choose; empty: all."""


class TlsSettings(Section):
    """A certificate; both files are read again on SIGHUP."""

    certificate: Path
    key: Path


class Timeouts(Section):
    """How long the gateway waits; the time that a request waits in Kairos is not in these, but in `total_s`."""

    connect_s: Positive = 2.0
    first_token_s: Positive = 30.0
    """From dispatch to the first token, beyond the TTFT target."""
    idle_s: Positive = 30.0
    """Between two pieces of an answer."""
    total_s: Positive = 1800.0
    drain_s: NotNegative = 30.0
    """What requests get to end when the gateway ends."""


class ControlPlane(Section):
    """Where the gateway gets strategy and models, and sends telemetry."""

    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    key: SecretStr | None = None


class GatewaySettings(Section):
    """The OpenAI-compatible gateway."""

    host: str = "127.0.0.1"
    port: Port = 8000
    max_body_bytes: Count = 64 * 2**20
    max_waiting: Count = 10_000
    """Requests that may wait; more are answered 429."""
    keys: tuple[GatewayKey, ...] = ()
    """None: loopback only, and everyone is the same tenant."""
    trusted_proxies: tuple[IPvAnyNetwork, ...] = ()
    """Networks whose word on tenant and class is taken."""
    tls: TlsSettings | None = None
    engine_ca: Path | None = None
    """Certificates that engines' are checked against; None: the system's."""
    timeouts: Timeouts = Timeouts()
    kv_lease_s: Positive = 30.0
    """How long a vLLM prefill engine holds KV for NIXL."""
    media_tokens: NotNegativeCount = 576
    """What an image or a sound in a chat counts as."""
    tokenizers: dict[str, Path] = {}
    """Folders of the models whose prompts are counted by their tokenizer and chat template, by the model's name."""
    health_s: Positive = 1.0
    """Between two looks at each engine."""
    control_plane: ControlPlane | None = None

    @model_validator(mode="after")
    def _keys_differ(self) -> "GatewaySettings":
        if len({entry.key.get_secret_value() for entry in self.keys}) < len(self.keys):
            raise ValueError("two keys are the same")
        return self

    @model_validator(mode="after")
    def _open_only_with_keys(self) -> "GatewaySettings":
        if not self.keys and not is_loopback(self.host):
            raise ValueError(f"host '{self.host}' is open to other machines; give keys, or use 127.0.0.1")
        return self


class TrainingSettings(Section):
    """How step-time models are made from the telemetry in the store, and how they come to serve."""

    promote: Literal["auto", "manual"] = "auto"
    """Auto: a model that passes the gate serves at once; manual: somebody promotes it."""
    every_s: Positive | None = 6 * 3600.0
    """Null: not by the clock."""
    after_rows: Count | None = 20_000
    """Steps of a profile since its last training; null: not by their number."""
    window_steps: Count = 500_000
    """The newest steps that a training reads, of all profiles together."""


class Retention(Section):
    """For how many days what is stored is kept; None: for ever."""

    steps_days: Count | None = 30
    requests_days: Count | None = 90
    samples_days: Count | None = 14
    decisions_days: Count | None = 14
    events_days: Count | None = 365
    rollups_days: Count | None = 1095
    """The sums by the hour that steps and requests leave behind."""


class TracingSettings(Section):
    """Where traces go."""

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """An OpenTelemetry collector's address, without /v1/traces; None: there are no traces."""


class StoreSettings(Section):
    """The database of the control plane."""

    url: SecretStr
    """sqlite:///PATH or postgresql://USER@HOST/NAME; never shown, since it may hold a password."""
    queued_rows: Count = 200_000
    """Rows of telemetry that may wait to be stored; more is answered 429."""
    retention: Retention = Retention()


class DecisionSettings(Section):
    """Which decisions are recorded, where there is a store."""

    sample_share: Annotated[NotNegative, Field(le=1)] = 0.01
    """Share of requests, by a hash of their id, that are recorded whatever happens to them."""
    long_wait_s: Positive = 10.0
    """Requests that wait so long are recorded."""
    queued_rows: Count = 20_000
    """Rows that may wait to be stored; beyond, the oldest are dropped and counted."""


class ManagedSettings(Section):
    """The managed form: announced requests and the live fleet, where there is a store."""

    ttl_s: Annotated[Number, Field(gt=0, le=86_400)] = 600.0
    """A reservation of which nothing was heard for so long expires, unless its announcement says otherwise."""
    most_reservations: Count = 100_000
    """Live ones; more is answered 429."""
    drain_s: NotNegative = 30.0
    """How long an instance that is removed keeps what it has."""
    health_every_s: Positive = 2.0
    """How often instances with an address are asked how they are."""


SHIPPED_STRATEGIES: dict[str, dict[str, Any]] = {
    "engine-default": {
        "prefill": "fcfs",
        "prefill_placement": "round-robin",
        "decode_placement": "least-requests",
        "decode": "continuous",
    },
    "tuned": {
        "prefill": {"name": "edf", "lost_last": True, "preempt": True},
        "prefill_placement": "late",
        "decode_placement": "headroom",
        "decode": {"name": "slack", "h": 0.9},
    },
    "paper": {
        "prefill": "kairos-paper",
        "prefill_placement": "round-robin",
        "decode_placement": "least-requests",
        "decode": "kairos-paper",
    },
    "kairos": {
        "prefill": "on-time",
        "prefill_placement": "late",
        "decode_placement": "headroom",
        "decode": "envelope",
    },
}
"""There without being written; a strategy of the same name in the file takes the place of one."""


def with_shipped(strategies: object) -> object:
    """Strategies of a settings file beside the shipped ones; what is no mapping stays, for pydantic to refuse."""
    if strategies is None:
        strategies = {}
    return deepcopy(SHIPPED_STRATEGIES) | dict(strategies) if isinstance(strategies, Mapping) else strategies


class Settings(Section):
    """Everything in kairos.yaml."""

    profiles: dict[str, ProfileSettings]
    fleet: Fleet
    slo: SloSettings = SloSettings()
    guards: Guards = Guards()
    strategies: Annotated[dict[str, StrategySettings], Field(validate_default=True)] = {}
    """Beside the shipped ones."""
    active: str = "kairos"
    service: ServiceSettings = ServiceSettings()
    gateway: GatewaySettings = GatewaySettings()
    training: TrainingSettings = TrainingSettings()
    access: AccessSettings = AccessSettings()
    tracing: TracingSettings = TracingSettings()
    store: StoreSettings | None = None
    """None: nothing is kept, and there are no routes for telemetry."""
    decisions: DecisionSettings = DecisionSettings()
    managed: ManagedSettings = ManagedSettings()

    @field_validator("strategies", mode="before")
    @classmethod
    def _beside_the_shipped(cls, strategies: object) -> object:
        return with_shipped(strategies)

    @model_validator(mode="after")
    def _names_exist(self) -> "Settings":
        problems: list[tuple[Loc, str]] = [
            (("fleet", role, index, "profile"), str(UnknownProfileError("profile", group.profile, self.profiles)))
            for role, index, group in self.fleet.groups()
            if group.profile not in self.profiles
        ]
        if self.active not in self.strategies:
            problems.append((("active",), str(UnknownNameError("strategy", self.active, self.strategies))))
        problems.extend(
            (("gateway", "keys", index, "classes"), str(UnknownNameError("SLO class", name, self.slo.classes)))
            for index, entry in enumerate(self.gateway.keys)
            for name in entry.classes
            if name not in self.slo.classes
        )
        _refuse(problems)
        return self

    def served_models(self, group: Group) -> tuple[str, ...]:
        """The names under which requests reach the instances of a group, adapters included."""
        return (group.serves or (self.profiles[group.profile].model,)) + group.adapters
