"""What passes through on its way to the client: the first token, how many came, usage, errors, without changing it.

Events are told apart by the fields that the OpenAI API gives them; the text in them is looked at for being there only.
"""

import re
from typing import Any

import msgspec

from kairos.adapters.gateway.errors import CallError

_EVENT_END = re.compile(rb"\r?\n\r?\n")
_USAGE, _ERROR, _DONE = b'"usage":{', b'{"error"', b"[DONE]"
_MARKS = _USAGE, _ERROR, _DONE
_OBJECT = b"data: {"
_TOKEN_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")


class Cached(msgspec.Struct, frozen=True, gc=False):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """The tokens of an answer, by the engine's count."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Cached | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that were in the KV cache; None: it does not say."""
        return None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class _Chunk(msgspec.Struct, gc=False):
    choices: list[dict[str, Any]] = []
    usage: Usage | None = None
    error: Any = None


class _Answer(msgspec.Struct, gc=False):
    usage: Usage | None = None


_chunk = msgspec.json.Decoder(_Chunk).decode
_answer = msgspec.json.Decoder(_Answer).decode


def usage_of(body: bytes) -> Usage | None:
    """The usage in an answer without streaming; None without one."""
    try:
        return _answer(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Relayed:
    """Reads one stream as it passes.

    Args:
        keep_usage: whether the client asked for the usage event; if not it is taken out.
    """

    __slots__ = ("_keep_usage", "_rest", "_skips", "done", "events", "usage")

    def __init__(self, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._rest = b""
        self._skips = False
        """Events may pass without a look: a first token has passed, which is content, reasoning or a tool call."""
        self.events = 0
        """Events with choices since the first token, that one included."""
        self.usage: Usage | None = None
        self.done = False
        """The end mark has passed."""

    def feed(self, data: bytes) -> bytes:
        """What of the stream may go to the client now: whole events.

        Raises:
            CallError: an error event, which is not passed on.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, out = 0, []
        while at < len(data):
            if self._skips and (plain := _plain_until(data, at)) > at:
                self.events += data.startswith(b"data:", at) + data.count(b"\n\ndata:", at, plain)
                out.append(data[at:plain])
                at = plain
            match = _EVENT_END.search(data, at)
            if match is None:
                break
            event = data[at : match.end()]
            if self._look_at(event):
                out.append(event)
            at = match.end()
        self._rest = data[at:]
        return b"".join(out)

    def passes(self, framed: bytes, start: int) -> bool:
        """Whether a chunk, whose content starts there, is one event that may go to the client as it is.

        It is counted then. `feed` would come to the same, for more.
        """
        if (
            self._skips
            and not self._rest
            and framed.startswith(_OBJECT, start)
            and framed.find(b"\n\n", start) == len(framed) - 4
            and framed.find(_USAGE) < 0
            and framed.find(_ERROR) < 0
        ):
            self.events += 1
            return True
        return False

    def _look_at(self, event: bytes) -> bool:
        """Take notice of an event; whether the client gets it."""
        content = content_of(event)
        if not content:
            return True
        if content == b"[DONE]":
            self.done = True
            return True
        try:
            chunk = _chunk(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return True
        if chunk.error is not None:
            raise failed()
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return chunk.usage is None or self._keep_usage
        if self._skips or any(map(_has_token, chunk.choices)):
            self._skips = True
            self.events += 1
        return True


def _plain_until(data: bytes, at: int) -> int:
    """Up to where there are whole events from `at` on that need no look: none with usage, an error or the end."""
    special = len(data)
    for mark in _MARKS:
        found = data.find(mark, at, special)
        if found >= 0:
            special = found
    end = data.rfind(b"\n\n", at, special)
    return at if end < 0 else end + 2


def content_of(event: bytes) -> bytes:
    """The data of an event; other lines are comments and fields that the APIs do not use."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2 and event.find(b"\r") < 0:  # one line
        return event[5:].strip()
    return b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def failed() -> CallError:
    """That an engine answers with an error event."""
    return CallError(502, "engine_error", "the engine failed while it answered", may_retry=True)


def _has_token(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(field) for field in _TOKEN_FIELDS)
    return bool(choice.get("text"))
