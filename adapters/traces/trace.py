"""A trace: recorded arrivals with prompt and output lengths, one array a column."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.errors import TraceError
from kairos.scheduler_core.slo import FloatArray

IntArray = NDArray[np.int64]

MAX_TOKENS = 100_000_000
"""No model takes a longer prompt or answer: a larger length is a mistake in the file."""
MAX_ARRIVAL_S = 1e11
"""Beyond this an arrival is in other units than seconds."""
LABELS = ("session_id", "turn", "type", "tenant", "slo_class", "model")
"""The optional text columns."""
SYNTHETIC = "synthetic"
"""A trace is synthetic when its name begins so, or the `type` of every row does (which survives a new file name)."""


@dataclass(frozen=True, slots=True)
class Trace:
    """n requests in the order of their file. Arrays and lists are (n,); an empty label means "not recorded"."""

    name: str
    """The file's name without its endings."""
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    request_id: list[RequestId] | None = None
    """All integers or all texts, each once; None: the rank by arrival serves as id."""
    block_ids: list[tuple[int, ...]] | None = None
    """Prefix block ids of each prompt: equal leading ids are a KV prefix that can be shared."""
    block_tokens: int = 0
    """Tokens of one block; 0 without block ids."""
    session_id: list[str] | None = None
    turn: list[str] | None = None
    type: list[str] | None = None
    tenant: list[str] | None = None
    slo_class: list[str] | None = None
    model: list[str] | None = None
    synthetic: bool = False
    """Drawn from statistics, not recorded."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was treated while reading, and in how many rows."""

    def __len__(self) -> int:
        return len(self.arrival_s)


def block_tokens_of(prompt_tokens: IntArray, block_ids: Sequence[tuple[int, ...]], where: str) -> tuple[int, int]:
    """How many tokens a prefix block holds, and how many rows do not fit that.

    The rule: the smallest power of two b with ceil(prompt / b) = number of ids in at least 95 % of the rows with ids.

    >>> block_tokens_of(np.array([6758, 7322]), [tuple(range(14)), tuple(range(15))], "example")
    (512, 0)

    Raises:
        TraceError: no power of two fits; `where` names the file.
    """
    blocks = np.array([len(ids) for ids in block_ids])
    prompts, blocks = prompt_tokens[blocks > 0], blocks[blocks > 0]
    for block_tokens in (2**k for k in range(17)):
        misfits = int(np.sum(-(-prompts // block_tokens) != blocks))
        if misfits <= 0.05 * len(blocks):
            return block_tokens, misfits
    raise TraceError(
        f"{where}, column hash_ids: no block size (a power of two up to {2**16} tokens) explains the number of ids a"
        " prompt has; give one id for each block of a prompt, the last one partial, or leave the column out"
    )
