"""One sequence of the torch engine."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.emulator.device import Job
from kairos.adapters.torch_engine.text import Text


@dataclass(slots=True, eq=False, kw_only=True)
class TorchJob(Job):
    """A job with its tokens."""

    ids: Sequence[int]
    """Of its prompt."""
    text_of: Text
    end_ids: Sequence[int] = ()
    entry: Entry
    """As the policies see it."""
    output: list[int] = field(default_factory=list)
    slot: int = -1
    """Where its KV is; -1: nowhere yet."""
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    """It has a slot for KV that comes from elsewhere."""
    kv: bytes = b""
    """For its decode worker, once its prompt has ended."""

    @property
    def finish_reason(self) -> str:
        """Why it ended, in the words of the OpenAI API."""
        return "stop" if self.output and self.output[-1] in self.end_ids else "length"

    @property
    def held_tokens(self) -> int:
        """Tokens in its slot while it decodes: all but the newest, which the next step computes."""
        return self.prompt_tokens + len(self.output) - 1

    def token_ids(self, first: int, count: int) -> Sequence[int]:
        """The ids of `count` output tokens from the `first`-th, from 1."""
        return self.output[first - 1 : first - 1 + count]

    def text(self, first: int, count: int) -> str:
        """What these tokens add to the text of those before them."""
        before = self.text_of.text(self.output[: first - 1])
        return self.text_of.text(self.output[: first - 1 + count])[len(before) :]

    def emit(self, token: int) -> bool:
        """Take a token; whether it was the last."""
        self.output.append(token)
        self.emitted = len(self.output)
        self.ended = self.emitted >= self.output_tokens or token in self.end_ids
        self.wake()
        return self.ended
