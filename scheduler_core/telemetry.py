"""What an engine reports: one record a step, one a request, and many steps of one profile as arrays.

The wire form is that of docs/files.md (telemetry); here are the glossary's names, seconds and tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import BoolArray, FloatArray

IntArray = NDArray[np.int64]

StepKind = Literal["prefill", "decode", "mixed"]
STEP_KINDS: tuple[StepKind, ...] = ("prefill", "decode", "mixed")

PHASES = ("", "idle", "context", "decode", "mixed")
"""What the engine did in the step before; '' = not recorded. `Steps.prev_phase` holds places in this tuple."""


class StepRecord(msgspec.Struct, frozen=True, gc=False):
    """One engine step: what it held and how long it took. Tokens are sums over the requests of the step."""

    kind: StepKind
    step_s: float
    n_requests: int = 0
    """With prompt tokens in the step."""
    new_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """KV already there for those requests: prefix hits and earlier chunks."""
    batch_size: int = 0
    """Requests in decode."""
    sum_context_tokens: int = 0
    """Of the requests in decode."""
    prev_phase: str = ""
    run: str = ""
    noisy: bool = False


class RequestRecord(msgspec.Struct, frozen=True, gc=False):
    """One request as it met its instance, and its latency: TTFT, TPOT or both (None = not recorded)."""

    input_tokens: int
    prefix_hit_ratio: float
    kv_cache_usage: float
    requests_running: int
    requests_waiting: int
    prefill_tokens_in_flight: int
    decode_tokens_in_flight: int
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class Steps:
    """n steps of one profile and kind, one array a column, each (n,). The fields are those of `StepRecord`."""

    profile: Profile
    kind: StepKind
    step_s: FloatArray
    n_requests: FloatArray
    new_tokens: FloatArray
    cached_tokens: FloatArray
    batch_size: FloatArray
    sum_context_tokens: FloatArray
    prev_phase: IntArray
    run: IntArray
    """Which recording a step is from; equal numbers = the same one."""
    noisy: BoolArray

    def __len__(self) -> int:
        return len(self.step_s)

    def take(self, index: IntArray | BoolArray) -> "Steps":
        """The steps at `index` (places or a mask)."""
        columns: dict[str, Any] = {name: getattr(self, name)[index] for name in _COLUMNS}
        return replace(self, **columns)

    @staticmethod
    def joined(group: Sequence["Steps"]) -> "Steps":
        """Steps of one profile and kind, one group after the other."""
        columns: dict[str, Any] = {name: np.concatenate([getattr(s, name) for s in group]) for name in _COLUMNS}
        return replace(group[0], **columns)

    @staticmethod
    def of(profile: Profile, records: Sequence[StepRecord]) -> "Steps":
        """Records of one kind as arrays.

        >>> Steps.of(Profile("H100", "m"), [StepRecord("decode", 0.01, batch_size=4)]).batch_size.tolist()
        [4.0]
        """
        kinds = {r.kind for r in records}
        if len(kinds) != 1:
            raise ValueError(f"records of one kind are needed, these have {sorted(kinds) or 'none'}")

        def column(values: Iterable[float]) -> FloatArray:
            return np.fromiter(values, np.float64, len(records))

        return Steps(
            profile,
            records[0].kind,
            column(r.step_s for r in records),
            column(r.n_requests for r in records),
            column(r.new_tokens for r in records),
            column(r.cached_tokens for r in records),
            column(r.batch_size for r in records),
            column(r.sum_context_tokens for r in records),
            np.array([PHASES.index(r.prev_phase) for r in records], np.int64),
            np.unique(np.array([r.run for r in records], np.str_), return_inverse=True)[1].astype(np.int64),
            np.array([r.noisy for r in records], np.bool_),
        )


_COLUMNS = tuple(f.name for f in fields(Steps) if f.name not in ("profile", "kind"))
