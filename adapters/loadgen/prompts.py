"""Prompts of token ids: as long as a trace says, with the prefixes in common that its block ids say.

Token ids are 100 to 999, which every tokenizer of a real model has, so that each takes four bytes of JSON and a prompt
is cut from one text instead of being written token by token.
"""

from functools import lru_cache

import numpy as np

from kairos.adapters.simulator.tables import Workload

_LOWEST, _IDS = 100, 900
_WIDTH = 4
"""Bytes of a token id and its comma."""
_POOL_TOKENS = 1 << 18
_MARK_TOKENS = 4
"""A block begins with its own id, written with so many tokens: blocks differ when their ids do."""


def prompt_json(workload: Workload, row: int) -> bytes:
    """The prompt of a request as a JSON array of token ids.

    Equal leading block ids make equal leading tokens; requests without block ids share nothing.
    """
    left = int(workload.prompt_tokens[row])
    ids = workload.block_ids[row] if workload.block_ids is not None else ()
    pieces = []
    for block_id in ids:
        if left <= 0:
            break
        pieces.append(_block(block_id, min(left, workload.block_tokens)))
        left -= workload.block_tokens
    if left > 0:
        pieces.append(_block(-1 - row, left))
    return b"[%b]" % b"".join(pieces)[:-1]


def _block(block_id: int, tokens: int) -> bytes:
    """So many tokens of a block, each with its comma."""
    mark = b"".join(b"%d," % (_LOWEST + block_id // _IDS**k % _IDS) for k in range(_MARK_TOKENS))
    if tokens <= _MARK_TOKENS:
        return mark[: tokens * _WIDTH]
    filler, rest = _filler(), tokens - _MARK_TOKENS
    start = block_id * 7919 % _POOL_TOKENS
    text = filler[start * _WIDTH : (start + rest) * _WIDTH]
    while len(text) < rest * _WIDTH:  # past the end of the filler, or longer than all of it
        text += filler[: rest * _WIDTH - len(text)]
    return mark + text


@lru_cache(maxsize=1)
def _filler() -> bytes:
    ids = np.random.default_rng(0).integers(_LOWEST, _LOWEST + _IDS, _POOL_TOKENS)
    text = np.full((_POOL_TOKENS, _WIDTH), ord(","), np.uint8)
    for place, power in enumerate((100, 10, 1)):
        text[:, place] = ord("0") + ids // power % 10
    return text.tobytes()
