"""Blocks of prompts that an instance has in its KV cache, as far as one knows: least recently used leave first."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Block ids that are in the KV cache of an instance.

    Args:
        capacity_tokens: KV tokens it may hold.
        block_tokens: tokens of one block.
    """

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self._capacity_blocks = capacity_tokens // block_tokens
        self._block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._blocks

    def hit_tokens(self, block_ids: Sequence[int], prompt_tokens: int) -> int:
        """Tokens of the leading blocks that are cached; at least one token of a prompt is always computed."""
        hits = 0
        for block in block_ids:
            if block not in self._blocks:
                break
            hits += 1
        return min(hits * self._block_tokens, prompt_tokens - 1)

    def use(self, block_ids: Sequence[int]) -> list[int]:
        """Put the blocks of a computed prompt in, leading ones most recent, so that a prefix outlives its ends.

        Returns:
            Those that made room.
        """
        for block in reversed(block_ids):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        surplus = range(max(0, len(self._blocks) - self._capacity_blocks))
        return [self._blocks.popitem(last=False)[0] for _ in surplus]
