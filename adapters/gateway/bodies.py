"""The body of a request: one shallow parse, a few fields read, the prompt carried along as the bytes that came.

Nothing here keeps or logs what a prompt says.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.stream import Relayed, Usage, usage_of

_STRIPPED = frozenset(
    {
        "kv_transfer_params",
        "ec_transfer_params",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "data_parallel_rank",
        "routed_dp_rank",
        "disagg_prefill_dp_rank",
        "priority",
        "request_id",
        "rid",
    }
)
"""Fields between Kairos and its engines: a client's are dropped."""

_NOT_IN_PREFILL = frozenset({"stream_options", "min_tokens", "logprobs", "top_logprobs", "best_of", "prompt_logprobs"})

_FALSE = msgspec.Raw(b"false")
_ONE = msgspec.Raw(b"1")
_MEDIA = (b'"image_url"', b'"input_audio"', b'"video_url"', b'"audio_url"')

Fields = dict[str, msgspec.Raw]
_decode_fields = msgspec.json.Decoder(Fields).decode
_encode = msgspec.json.Encoder().encode


class Text(msgspec.Struct, frozen=True):
    """How long a prompt is, before anyone has counted its tokens."""

    text_bytes: int
    """0 for prompts of tokens."""
    tokens: int
    """Of prompts of tokens: exact."""
    media: int = 0
    """Images, sounds, videos."""
    sequences: int = 1


class Body:
    """A parsed body.

    Args:
        model: the one that answers where it names none; empty: it must.

    Raises:
        CallError: it is no JSON object, or a field is not what it must be.
    """

    __slots__ = ("_raw", "fields", "model", "stream", "wants_usage")
    engine = ""
    """The only one that takes such requests; empty: any."""

    def __init__(self, raw: bytes, model: str = "") -> None:
        try:
            fields = _decode_fields(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
            raise CallError(400, "invalid_json", f"the body is no JSON object: {problem}") from None
        self._raw: bytes | None = raw
        """As it came; None when an engine must not get it so."""
        if not _STRIPPED.isdisjoint(fields):
            self._raw = None
            fields = {name: value for name, value in fields.items() if name not in _STRIPPED}
        self.fields: Fields = fields
        self.model: str = self._field("model", str, model) or model
        if not self.model:
            raise CallError(400, "model_missing", "model is missing; GET /v1/models lists them")
        self.stream: bool = self._field("stream", bool, False)
        options: Mapping[str, Any] = self._field("stream_options", dict, {})
        self.wants_usage = bool(options.get("include_usage"))

    def text(self, chat: bool) -> Text:
        """How much there is to compute.

        Raises:
            CallError: there is no prompt, or it is of no known form.
        """
        text = self._chat() if chat else self._prompt()
        if "n" in self.fields or "best_of" in self.fields:
            several = max(self._count("n", 1), self._count("best_of", 0), 1)
            return msgspec.structs.replace(text, sequences=text.sequences * several)
        return text

    def prefix(self, chat: bool) -> list[bytes]:
        """The bytes that decide what a KV cache holds, those that come first in front."""
        parts = [bytes(self.fields[name]) for name in ("tools",) if chat and name in self.fields]
        prompt = self.fields.get("messages" if chat else "prompt")
        return parts if prompt is None else [*parts, bytes(prompt)]

    @property
    def is_salted(self) -> bool:
        """Whether its KV is not to be shared with other requests' (`cache_salt` of vLLM)."""
        return "cache_salt" in self.fields

    def prompts(self) -> Any:
        """The prompts as they came, which `text` has checked: text, tokens, or a list of either."""
        return msgspec.json.decode(self.fields["prompt"])

    def token_prompts(self) -> list[list[int]]:
        """The prompts of a request whose prompts are tokens."""
        prompts = self.prompts()
        return prompts if isinstance(prompts[0], list) else [prompts]

    def reader(self) -> Relayed:
        """What reads the stream that answers it."""
        return Relayed(keep_usage=self.wants_usage)

    def usage_in(self, answer: bytes) -> Usage | None:
        """The usage in an answer without streaming; None without one."""
        return usage_of(answer)

    def prefill_leg(self, extra: Mapping[str, Any]) -> bytes:
        """The body for the prefill engine: one token, no stream, with other fields."""
        fields: dict[str, Any] = {name: raw for name, raw in self.fields.items() if name not in _NOT_IN_PREFILL}
        fields["stream"] = _FALSE
        fields["max_tokens"] = _ONE
        if "max_completion_tokens" in fields:
            fields["max_completion_tokens"] = _ONE
        if "n" in fields:
            fields["n"] = _ONE
        return _encode(fields | dict(extra))

    def whole(self, extra: Mapping[str, Any]) -> bytes:
        """The body for the engine that answers, with other fields; a stream is asked to tell its usage."""
        if self.stream and not self.wants_usage:
            options: dict[str, Any] = self._field("stream_options", dict, {})
            extra = {"stream_options": {**options, "include_usage": True}, **extra}
        return self._with(extra)

    def _with(self, extra: Mapping[str, Any]) -> bytes:
        """The body with other fields: in front of what came, where that has none of them."""
        if self._raw is None or not self.fields.keys().isdisjoint(extra):
            return _encode(self.fields | dict(extra))
        if not extra:
            return self._raw
        return _encode(extra)[:-1] + b"," + self._raw[self._raw.index(b"{") + 1 :]

    # -- fields

    def _field(self, name: str, kind: type[Any] | tuple[type[Any], ...], default: Any) -> Any:
        raw = self.fields.get(name)
        if raw is None:
            return default
        try:
            value = msgspec.json.decode(raw)
        except msgspec.DecodeError as problem:
            raise CallError(400, "invalid_json", f"{name}: {problem}") from None
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise CallError(400, "invalid_field", f"{name} must be {' or '.join(_NAMES[each] for each in kinds)}")
        return value

    def _count(self, name: str, default: int) -> int:
        count: int = self._field(name, int, default)
        if count < 0:
            raise CallError(400, "invalid_field", f"{name} must not be negative")
        return count

    def _prompt(self) -> Text:
        raw = self.fields.get("prompt")
        if raw is None:
            raise CallError(400, "prompt_missing", "prompt is missing")
        return prompts_in(raw, "prompt")

    def _chat(self) -> Text:
        raw = self.fields.get("messages")
        if raw is None:
            raise CallError(400, "messages_missing", "messages is missing")
        tools = len(memoryview(self.fields["tools"])) if "tools" in self.fields else 0
        content = bytes(raw)
        if not any(mark in content for mark in _MEDIA):
            return Text(len(content) + tools, 0)
        try:
            messages = msgspec.json.decode(content)
        except msgspec.DecodeError as problem:
            raise CallError(400, "invalid_json", f"messages: {problem}") from None
        text_bytes, media = tools, 0
        for part in _parts(messages):
            if isinstance(part, str):
                text_bytes += len(part.encode())
            else:
                media += 1
        return Text(text_bytes, 0, media)


_NAMES: dict[type[Any], str] = {
    **{str: "text", bool: "true or false", dict: "an object", int: "a whole number", list: "a list"},
    object: "anything",
}


def prompts_in(raw: msgspec.Raw, name: str) -> Text:
    """How long a prompt, or several, is that a field holds.

    Raises:
        CallError: it is of no known form.
    """
    if len(view := memoryview(raw)) and bytes(view[:1]) == b'"':
        return Text(len(view) - 2, 0)
    try:
        return _listed(msgspec.json.decode(raw), name)
    except msgspec.DecodeError as problem:
        raise CallError(400, "invalid_json", f"{name}: {problem}") from None


def _listed(prompt: object, name: str) -> Text:
    """Prompts of tokens, or several prompts."""
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return Text(0, len(prompt))
        if all(isinstance(item, str) for item in prompt):
            return Text(sum(len(item.encode()) for item in prompt), 0, sequences=len(prompt))
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompt):
            return Text(0, sum(map(len, prompt)), sequences=len(prompt))
    raise CallError(400, "invalid_field", f"{name} must be text, a list of tokens, or a list of either")


def _parts(messages: object) -> list[object]:
    """Texts of the messages, and anything else that is in them."""
    parts: list[object] = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content or ""]:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
            parts.append(text)
    return parts
