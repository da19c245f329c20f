"""What an emulated engine reads from a request: sequences with their lengths, and how much each may produce."""

from collections.abc import Sequence
from typing import Any, NamedTuple

BYTES_PER_TOKEN = 4
"""Its tokenizer: four bytes of text are a token."""
IMAGE_TOKENS = 256
BLOCK_TOKENS = 16


class BadRequest(Exception):
    """A request that the engine refuses with 400."""


class Prompt(NamedTuple):
    """One prompt."""

    tokens: int
    blocks: Sequence[int]
    """Ids of its whole blocks; equal prefixes have equal ids."""
    pieces: Sequence[bytes | Sequence[int]]
    """What is in the blocks: text, or tokens."""
    content: bytes | Sequence[int]
    """All of it: text, or tokens."""

    def token_ids(self, first: int, end: int) -> list[int]:
        """The tokens of its blocks from `first` to before `end`; four bytes of text are a token, whatever they say."""
        return [token for piece in self.pieces[first:end] for token in _ids_of(piece)]


def from_native(body: dict[str, Any]) -> dict[str, Any]:
    """A body of SGLang's `/generate` in the fields of a completion.

    Raises:
        BadRequest: it has no prompt, or several.
    """
    sampling = body.get("sampling_params") or {}
    text, input_ids = body.get("text"), body.get("input_ids")
    if not isinstance(sampling, dict) or (text is None) == (input_ids is None):
        raise BadRequest("either text or input_ids should be provided, and sampling_params be an object")
    told = {"prompt": input_ids if text is None else text, "max_tokens": sampling.get("max_new_tokens", 128)}
    return body | told | {"n": sampling.get("n")}


def prompts_of(body: dict[str, Any], chat: bool) -> list[Prompt]:
    """The prompts of a completion, or the one of a chat.

    Raises:
        BadRequest: there are none, or they are of no known form.
    """
    if chat:
        return [_chat(body.get("messages"))]
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [_text(prompt.encode())]
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("prompt is missing")
    if all(isinstance(item, int) for item in prompt):
        return [_tokens(prompt)]
    if all(isinstance(item, str) for item in prompt):
        return [_text(item.encode()) for item in prompt]
    if all(isinstance(item, list) and item and all(isinstance(token, int) for token in item) for item in prompt):
        return [_tokens(item) for item in prompt]
    raise BadRequest("prompt is neither text, nor tokens, nor a list of either")


def output_limit(body: dict[str, Any]) -> int:
    """Tokens that each sequence produces: there is no end of sequence, so as many as are allowed.

    Raises:
        BadRequest: the limit is no count.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    if not isinstance(limit, int) or limit < 1:
        raise BadRequest("max_tokens must be at least 1")
    return limit


def sequences_a_prompt(body: dict[str, Any]) -> int:
    """The parameter n.

    Raises:
        BadRequest: it is no count.
    """
    n = body.get("n") or 1
    if not isinstance(n, int) or not 1 <= n <= 128:
        raise BadRequest("n must be from 1 to 128")
    return n


def _chat(messages: object) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is missing")
    text, images = bytearray(), 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        text += str(message.get("role") if isinstance(message, dict) else "").encode() + b"\n"
        for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
            if isinstance(part, dict) and part.get("type") == "text":
                text += str(part.get("text", "")).encode()
            else:
                images += 1
    prompt = _text(bytes(text))
    return prompt._replace(tokens=prompt.tokens + images * IMAGE_TOKENS)


def _text(text: bytes) -> Prompt:
    size = BLOCK_TOKENS * BYTES_PER_TOKEN
    pieces = [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
    return Prompt(max(1, -(-len(text) // BYTES_PER_TOKEN)), _chain(pieces), pieces, text)


def _tokens(tokens: Sequence[int]) -> Prompt:
    starts = range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS)
    pieces = [tuple(tokens[start : start + BLOCK_TOKENS]) for start in starts]
    return Prompt(len(tokens), _chain(pieces), pieces, tokens)


def _ids_of(piece: bytes | Sequence[int]) -> Sequence[int]:
    if not isinstance(piece, bytes):
        return piece
    starts = range(0, len(piece), BYTES_PER_TOKEN)
    return [int.from_bytes(piece[start : start + BYTES_PER_TOKEN], "big") for start in starts]


def _chain(pieces: Sequence[object]) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        ids.append(hash((ids[-1] if ids else 0, piece)))
    return ids
