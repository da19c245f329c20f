"""SGLang's own API, `POST /generate`, where its bodies and answers differ from those of the OpenAI API."""

from collections.abc import Mapping
from typing import Any

import msgspec

from kairos.adapters.gateway.bodies import Body, Text, prompts_in
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.stream import Cached, Relayed, Usage, content_of, failed

_MEDIA = ("image_data", "audio_data", "video_data")


class _Meta(msgspec.Struct, frozen=True, gc=False):
    """`meta_info` of an answer: what it has cost so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None


class _Piece(msgspec.Struct, frozen=True, gc=False):
    meta_info: _Meta = _Meta()
    index: int = 0
    """Which sequence of several."""
    error: Any = None


_piece = msgspec.json.Decoder(_Piece).decode
_answer = msgspec.json.Decoder(list[_Piece] | _Piece).decode


class NativeBody(Body):
    """A parsed body of `/generate`.

    Args:
        model: the one that answers where it names none; SGLang serves one, and takes no name.

    Raises:
        CallError: as `Body`.
    """

    __slots__ = ()
    engine = "sglang"

    def __init__(self, raw: bytes, model: str) -> None:
        super().__init__(raw, model)
        absent = [name for name in ("text", "input_ids") if bytes(self.fields.get(name, b"null")) == b"null"]
        for name in ("model", *absent):
            if self.fields.pop(name, None) is not None:
                self._raw = None
        self.wants_usage = True

    def text(self, chat: bool) -> Text:
        """How much there is to compute."""
        sampling = self._field("sampling_params", (dict, list), {})
        each = sampling if isinstance(sampling, list) else [sampling]
        counts = [(one.get("n") or 1) if isinstance(one, dict) else 0 for one in each]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CallError(400, "invalid_field", "sampling_params must be one object or a list of them, n a count")
        text = self._prompts("text", "input_ids")
        media = sum(len(held) if isinstance(held := self._field(name, object, []), list) else 1 for name in _MEDIA)
        return msgspec.structs.replace(text, media=media, sequences=text.sequences * max(counts, default=1))

    def prefix(self, chat: bool) -> list[bytes]:
        """The bytes that decide what a KV cache holds."""
        return [bytes(self.fields[name]) for name in ("text", "input_ids") if name in self.fields]

    def prompts(self) -> object:
        """The prompts as they came: texts, tokens, or lists of either."""
        return msgspec.json.decode(self.fields["text" if "text" in self.fields else "input_ids"])

    def whole(self, extra: Mapping[str, Any]) -> bytes:
        """The body for the engine, with other fields."""
        return self._with(extra)

    def reader(self) -> Relayed:
        """What reads its stream."""
        return _NativeRelayed()

    def usage_in(self, answer: bytes) -> Usage | None:
        """The usage in an answer without streaming."""
        try:
            told = _answer(answer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        return _usage([piece.meta_info for piece in (told if isinstance(told, list) else [told])])

    def _prompts(self, *names: str) -> Text:
        for name in names:
            if name in self.fields:
                return prompts_in(self.fields[name], name)
        raise CallError(400, "prompt_missing", "text and input_ids are missing")


class _NativeRelayed(Relayed):
    """Reads one stream, each event of which says how many tokens there are by now."""

    __slots__ = ("_metas",)

    def __init__(self) -> None:
        super().__init__(keep_usage=True)
        self._metas: dict[int, _Meta] = {}

    def _look_at(self, event: bytes) -> bool:
        content = content_of(event)
        if content == b"[DONE]":
            self.done = True
            return True
        try:
            piece = _piece(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return True
        if piece.error is not None:
            raise failed()
        self._metas[piece.index] = piece.meta_info
        self.usage = _usage(list(self._metas.values()))
        self.events = self.usage.completion_tokens or 0
        return True


def _usage(metas: list[_Meta]) -> Usage:
    """Sequences of one prompt share its tokens."""
    cached = [meta.cached_tokens for meta in metas if meta.cached_tokens is not None]
    return Usage(
        max((meta.prompt_tokens for meta in metas), default=0),
        sum(meta.completion_tokens for meta in metas),
        Cached(max(cached)) if cached else None,
    )
