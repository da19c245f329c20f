"""Which prefixes an instance has in its KV cache: an index of salted hashes of what was sent there.

Blocks are pieces of the prompt's own bytes; the salt is of this process, so that hashes tell nothing about prompts.
"""

import hashlib
import os
from collections.abc import Sequence

from kairos.scheduler_core.prefix_cache import PrefixCache

BLOCK_BYTES = 256
_BYTES_PER_TOKEN = 4
_SALT = os.urandom(16)


def block_ids(parts: Sequence[bytes]) -> list[int]:
    """Ids of the whole blocks of a prompt; prompts that begin alike have the same first ones."""
    ids: list[int] = []
    digest = hashlib.blake2b(key=_SALT, digest_size=8)
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view) - BLOCK_BYTES + 1, BLOCK_BYTES):
            digest.update(view[start : start + BLOCK_BYTES])
            ids.append(int.from_bytes(digest.digest(), "big"))
        digest.update(b"|")
    return ids


class PrefixIndex:
    """What one instance is thought to have cached, least recently used forgotten.

    Args:
        kv_tokens: its KV capacity.
    """

    def __init__(self, kv_tokens: int) -> None:
        self._kv_tokens = kv_tokens
        self.forget()

    def forget(self) -> None:
        """The instance was started anew: it has nothing."""
        self._blocks = PrefixCache(self._kv_tokens * _BYTES_PER_TOKEN, BLOCK_BYTES)
        self._trust = 1.0

    def hit_tokens(self, blocks: Sequence[int], prompt_bytes: int, prompt_tokens: int) -> int:
        """Tokens of a prompt that are thought to be cached; at least one is always computed."""
        if not blocks:
            return 0
        hit = self._blocks.hit_tokens(blocks, prompt_bytes + 1)
        return min(int(self._trust * hit / prompt_bytes * prompt_tokens), prompt_tokens - 1)

    def use(self, blocks: Sequence[int]) -> None:
        """A prompt was sent there."""
        self._blocks.use(blocks)

    def correct(self, expected_tokens: int, cached_tokens: int) -> None:
        """Take in what the engine says was cached where the index expected hits."""
        if expected_tokens > 0:
            share = min(cached_tokens / expected_tokens, 1.0)
            self._trust = 0.8 * self._trust + 0.2 * share
