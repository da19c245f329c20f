"""`Settings`: one strict YAML file, then environment variables (docs/configuration.md names every setting).

`load_settings` is called once, where a process starts; everything else is handed the `Settings` or a part of it.
"""

import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from kairos.scheduler_core.domain import Control, Line, LinearStepTimes, Profile
from kairos.scheduler_core.errors import ConfigError, UnknownNameError, UnknownProfileError
from kairos.scheduler_core.plugins import POLICY_KINDS
from kairos.scheduler_core.strategy import PolicyChoice, Strategy

PREFIX = "KAIROS_"
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
    """What answers at `url`."""
    forward_pass: Annotated[str, Field(pattern=r"^(tcp|ipc)://\S+$")] | None = None
    """Where it publishes forward-pass metrics (docs/telemetry.md)."""


class PrefillGroup(Group):
    """Instances that compute prompts."""

    chunk_tokens: Count | None = None
    """Token budget of one step; None: whole prompts."""
    max_requests_per_step: Count = 1
    prefix_cache: bool = False
    kv_tokens: Count | None = None
    """Capacity of the prefix cache."""
    kv_held_tokens: Count | None = None
    """Limit of the KV held for transfer; None: none, prefill never waits for decode."""

    @model_validator(mode="after")
    def _a_cache_has_a_size(self) -> "PrefillGroup":
        if self.prefix_cache and self.kv_tokens is None:
            raise ValueError("prefix_cache needs kv_tokens, the capacity of the cache")
        return self


class DecodeGroup(Group):
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
    kv_transfer: KvTransfer = KvTransfer()
    handover: Handover = Handover()

    @field_validator("prefill", "decode", mode="before")
    @classmethod
    def _null_is_empty(cls, groups: object) -> object:
        return () if groups is None else groups

    @model_validator(mode="after")
    def _both_roles(self) -> "Fleet":
        _refuse(
            ((role,), f"a fleet needs at least one {role} instance")
            for role in ("prefill", "decode")
            if not getattr(self, role)
        )
        return self


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
    port: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=65535)] = 8011
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


def _with_shipped(strategies: object) -> object:
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
        return _with_shipped(strategies)

    @model_validator(mode="after")
    def _names_exist(self) -> "Settings":
        problems: list[tuple[Loc, str]] = [
            (("fleet", role, index, "profile"), str(UnknownProfileError("profile", group.profile, self.profiles)))
            for role, groups in (("prefill", self.fleet.prefill), ("decode", self.fleet.decode))
            for index, group in enumerate(groups)
            if group.profile not in self.profiles
        ]
        if self.active not in self.strategies:
            problems.append((("active",), str(UnknownNameError("strategy", self.active, self.strategies))))
        _refuse(problems)
        return self

    def served_models(self, group: Group) -> tuple[str, ...]:
        """The names under which requests reach the instances of a group, adapters included."""
        return (group.serves or (self.profiles[group.profile].model,)) + group.adapters


# -- loading ---------------------------------------------------------------------------------------------------------


def load_settings(path: Path | None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a YAML file, each overridden by its environment variable `KAIROS_SECTION__KEY` if that is set.

    The words of a variable lead to a setting: names in any case, '_' for '-', an index for a group of the fleet
    (`KAIROS_FLEET__PREFILL__0__COUNT`). Its value is read as YAML. Variables without '__' that name no setting
    (`KAIROS_DATA`) are others' business.

    Args:
        path: None: the environment alone.

    Raises:
        ConfigError: one line with every problem, each with the path of its setting.
    """
    document = {} if path is None else _beside(path, _read_yaml(path))
    where = "environment" if path is None else str(path)
    document["strategies"] = _with_shipped(document.get("strategies"))
    origins = _apply_environment(document, environ)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(problem, origins) for problem in error.errors())) from None


def _beside(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The document with model files that lie beside it found from any folder."""
    profiles = document.get("profiles")
    for profile in profiles.values() if isinstance(profiles, dict) else ():
        times = profile.get("step_times") if isinstance(profile, dict) else None
        if isinstance(times, dict) and isinstance(times.get("model"), str) and (path.parent / times["model"]).is_file():
            times["model"] = str(path.parent / times["model"])
    return document


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing a key that is given twice (PyYAML lets the last one win)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and name != "<<":
                raise yaml.MarkedYAMLError(problem=f"'{name}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse_yaml(where: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: {error.problem or 'is not YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that cannot be
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text (byte {error.start} is not UTF-8)") from None
    document = _parse_yaml(str(path), text)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: needs sections (profiles, fleet, ...), holds {_shown(document)}")
    return document


def _apply_environment(document: dict[str, Any], environ: Mapping[str, str]) -> dict[Loc, str]:
    """Write the variables into the document; which setting came from which variable."""
    origins: dict[Loc, str] = {}
    for variable in sorted(environ):
        words = variable.removeprefix(PREFIX).lower().split("__")
        if not variable.startswith(PREFIX) or (len(words) == 1 and words[0] not in Settings.model_fields):
            continue
        value = _parse_yaml(variable, environ[variable])
        node: Any = document
        loc: list[int | str] = []
        for depth, word in enumerate(words):
            key = _key(node, word)
            if key is None:
                place = _shown_path(loc)
                holds = "a secret" if loc and loc[0] in _SECRET_SECTIONS else _shown(node)
                raise ConfigError(f"{variable}: there is no '{word}' in {place}, which holds {holds}")
            loc.append(key)
            if depth == len(words) - 1:
                node[key] = value
            elif isinstance(node, dict):
                node = node.setdefault(key, {})
            else:
                node = node[key]
        origins[tuple(loc)] = variable
    return origins


def _key(node: Any, word: str) -> int | str | None:
    """What a word of a variable's name means in a section (its key) or a list (an index)."""
    if isinstance(node, dict):
        alike = (key for key in node if re.sub(r"\W", "_", str(key)).lower() == word)
        return next(alike, word)
    if isinstance(node, list) and word.isdecimal() and int(word) < len(node):
        return int(word)
    return None


_SECRET_SECTIONS = ("access", "store")


def _explain(problem: Mapping[str, Any], origins: Mapping[Loc, str]) -> str:
    loc: Loc = problem["loc"]
    text = problem["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    if problem["type"] == "extra_forbidden":
        text = _unknown(loc)
    elif problem["type"] == "missing":
        text = "is missing"
    elif loc[0] in _SECRET_SECTIONS:
        pass  # what was given may be the secret
    elif problem["type"] not in ("kairos", "value_error") or not isinstance(problem["input"], dict | None):
        text = f"{text}, got {_shown(problem['input'])}"
    depth = len(loc)
    origin = next(
        (f" (see {name})" for place, name in origins.items() if loc[: len(place)] == place or place[:depth] == loc), ""
    )
    return f"{_shown_path(loc)}: {text}{origin}"


def _unknown(loc: Loc) -> str:
    """That a setting does not exist, with the nearest of its section, found in the JSON schema."""
    schema = Settings.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc[:-1]:
        node = node.get("properties", {}).get(part) or node.get("items") or node["additionalProperties"]
        node = next((option for option in node.get("anyOf", ()) if option.get("type") != "null"), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    known = sorted(node["properties"])
    near = get_close_matches(str(loc[-1]), known, n=1)
    return "unknown setting." + (f" Did you mean '{near[0]}'?" if near else "") + f" Known: {', '.join(known)}"


def _shown_path(loc: Iterable[int | str]) -> str:
    """A path as people write it.

    >>> _shown_path(("fleet", "prefill", 0, "count"))
    'fleet.prefill[0].count'
    """
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return shown.lstrip(".") or "the file"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
