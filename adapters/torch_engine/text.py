"""Text to tokens and back: a folder's tokenizer.json, or, for a drawn model, bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kairos.scheduler_core.errors import ConfigError


class Text(Protocol):
    """A tokenizer."""

    def ids(self, text: str) -> Sequence[int]:
        """The tokens of a text."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class Bytes:
    """Each byte is a token; a token that comes out is its number. For models that mean nothing."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def ids(self, text: str) -> Sequence[int]:
        """The tokens of a text."""
        return [byte % self._vocab for byte in text.encode()]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(f" {token}" for token in ids)


class Vocabulary:
    """The tokenizer of a model.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as problem:  # what the library raises
            raise ConfigError(f"cannot read the tokenizer {path}: {problem}") from None

    def ids(self, text: str) -> Sequence[int]:
        """The tokens of a text."""
        found: list[int] = self._tokenizer.encode(text).ids
        return found

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        told: str = self._tokenizer.decode(list(ids))
        return told


def text_of(model: str, vocab: int) -> Text:
    """The tokenizer of a model: the one in its folder, else bytes."""
    path = Path(model) / "tokenizer.json"
    return Vocabulary(path) if path.is_file() else Bytes(vocab)
