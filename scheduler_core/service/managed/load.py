"""What live reservations ask of each instance: sums that change with one reservation at a time.

A reservation's share follows from its state alone, so the sums are those of the live reservations whatever happened in
between. Predicted seconds are summed in whole nanoseconds: what was added is taken off again to the last bit.
"""

import heapq
from collections import Counter
from typing import NamedTuple

from kairos.scheduler_core.service.managed.reservation import Reservation
from kairos.scheduler_core.slo import NO_TARGET_S


class Share(NamedTuple):
    """What one reservation asks of its two instances."""

    prefill_instance: str
    """Empty: its prompt is done."""
    prefill_tokens: int
    prefill_ns: int
    started_s: float | None
    decode_instance: str
    context_tokens: int
    resident: bool
    tpot_target_s: float


def share_of(reservation: Reservation) -> Share | None:
    """What a reservation asks; None once it has ended.

    A prompt counts as waiting for its decode instance from the announcement, and as resident once its KV is there.
    """
    terms, progress, stage = reservation.terms, reservation.progress, reservation.stage
    if stage == "ended":
        return None
    prefill = stage != "decode"
    return Share(
        terms.prefill_instance if prefill else "",
        terms.prompt_tokens - terms.cached_tokens if prefill else 0,
        round(terms.predicted_prefill_s * 1e9) if prefill else 0,
        progress.prefill_started_s if prefill else None,
        terms.decode_instance,
        terms.prompt_tokens + progress.output_tokens,
        progress.transferred_s is not None or progress.output_tokens > 1,
        NO_TARGET_S if terms.tpot_target_s is None else terms.tpot_target_s,
    )


class PrefillTotals:
    """Of one prefill instance."""

    __slots__ = ("current", "requests", "running", "tokens", "work_ns")

    def __init__(self) -> None:
        self.requests = self.running = self.tokens = self.work_ns = 0
        self.current: tuple[float, float, str] | None = None
        """The latest that began and is not through: when, its predicted seconds, its id."""

    def outstanding_s(self, now_s: float) -> float:
        """Predicted seconds of all that is not done, less what the one that runs has had."""
        done_s = 0.0
        if self.current is not None:
            began_s, prefill_s, _ = self.current
            done_s = min(max(0.0, now_s - began_s), prefill_s)
        return max(0.0, self.work_ns / 1e9 - done_s)


class DecodeTotals:
    """Of one decode instance."""

    __slots__ = ("_lowest", "_targets", "batch_size", "sum_context_tokens", "waiting_requests", "waiting_tokens")

    def __init__(self) -> None:
        self.batch_size = self.sum_context_tokens = self.waiting_requests = self.waiting_tokens = 0
        self._targets: Counter[float] = Counter()
        self._lowest: list[float] = []

    def count_target(self, target_s: float, by: int) -> None:
        """Note that a request with a TPOT target came (1) or left (-1)."""
        self._targets[target_s] += by
        if by > 0 and self._targets[target_s] == 1:
            heapq.heappush(self._lowest, target_s)
        elif not self._targets[target_s]:
            del self._targets[target_s]

    @property
    def tightest_tpot_s(self) -> float:
        """The smallest target of those there."""
        while self._lowest and self._lowest[0] not in self._targets:
            heapq.heappop(self._lowest)
        return self._lowest[0] if self._lowest else NO_TARGET_S


class Load:
    """The sums of all instances, and who is on each. Not safe for threads: its owner has a lock."""

    def __init__(self) -> None:
        self.prefill: dict[str, PrefillTotals] = {}
        self.decode: dict[str, DecodeTotals] = {}
        self.members: dict[str, set[str]] = {}
        """Ids of live reservations, by instance."""
        self._shares: dict[str, Share] = {}

    def __len__(self) -> int:
        return len(self._shares)

    def put(self, reservation: Reservation) -> None:
        """Count a reservation as it is now, in place of what it was before."""
        request_id, share = reservation.terms.request_id, share_of(reservation)
        before = self._shares.pop(request_id, None)
        if before is not None:
            self._count(request_id, before, -1)
        if share is not None:
            self._shares[request_id] = share
            self._count(request_id, share, 1)

    def on_prefill(self, instance_id: str) -> PrefillTotals:
        """The sums of a prefill instance."""
        return self.prefill.setdefault(instance_id, PrefillTotals())

    def on_decode(self, instance_id: str) -> DecodeTotals:
        """The sums of a decode instance."""
        return self.decode.setdefault(instance_id, DecodeTotals())

    def _count(self, request_id: str, share: Share, by: int) -> None:
        if share.prefill_instance:
            prefill = self.on_prefill(share.prefill_instance)
            prefill.requests += by
            prefill.tokens += by * share.prefill_tokens
            prefill.work_ns += by * share.prefill_ns
            if share.started_s is not None:
                prefill.running += by
                began = share.started_s, share.prefill_ns / 1e9, request_id
                if by > 0 and (prefill.current is None or began > prefill.current):
                    prefill.current = began
                elif by < 0 and prefill.current == began:
                    prefill.current = None
        if share.decode_instance:
            decode = self.on_decode(share.decode_instance)
            if share.resident:
                decode.batch_size += by
                decode.sum_context_tokens += by * share.context_tokens
            else:
                decode.waiting_requests += by
                decode.waiting_tokens += by * share.context_tokens
            decode.count_target(share.tpot_target_s, by)
        for instance_id in {share.prefill_instance, share.decode_instance} - {""}:
            members = self.members.setdefault(instance_id, set())
            (members.add if by > 0 else members.discard)(request_id)
            if not members:
                del self.members[instance_id]
