"""A reservation: what was settled at its announcement, and how far the request has come.

Progress only grows: two states of one reservation have one merger, whatever came first and however often it was told.
So events may come in any order, twice, or at different replicas.
"""

from typing import Literal, NamedTuple

import msgspec

from kairos.scheduler_core.slo import tpot_s
from kairos.scheduler_core.telemetry import RequestRow, RequestStatus

How = Literal["finished", "failed", "released", "instance_gone", "expired"]
_STATUS: dict[str, RequestStatus] = {"finished": "finished", "failed": "failed", "instance_gone": "failed"}
"""Ends that are telemetry; one that was released or expired says nothing of how it went."""

Stage = Literal["waiting", "prefill", "decode", "ended"]


class Met(msgspec.Struct, frozen=True):
    """What it met on its instances, as telemetry tells it."""

    requests_running: int
    requests_waiting: int
    prefill_tokens_in_flight: int
    decode_tokens_in_flight: int
    kv_cache_usage: float


class Terms(msgspec.Struct, frozen=True):
    """What was settled at the announcement. Times are UTC epoch seconds."""

    request_id: str
    digest: str
    """Of what was announced."""
    decision_id: str
    arrival_s: float
    ttl_s: float
    prompt_tokens: int
    cached_tokens: int
    """On the prefill instance that was chosen."""
    tenant: str
    slo_class: str
    ttft_target_s: float | None
    tpot_target_s: float | None
    prefill_instance: str
    decode_instance: str
    predicted_prefill_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float | None
    strategy: str
    model_version: str
    profile: tuple[str, str, str, int, int, str]
    """Of the prefill instance: gpu, model, precision, tp, ep, engine."""
    met: Met


class End(NamedTuple):
    """How it ended; of two ends the lower one holds, and any other before an expiry."""

    expired: bool
    at_s: float
    how: How


class Progress(msgspec.Struct, frozen=True):
    """How far it has come; null: not told."""

    expires_at_s: float
    prefill_started_s: float | None = None
    first_token_s: float | None = None
    transferred_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    end: End | None = None

    def merged(self, other: "Progress") -> "Progress":
        """Both in one: the earliest beginnings, the furthest progress."""
        return Progress(
            max(self.expires_at_s, other.expires_at_s),
            _earliest(self.prefill_started_s, other.prefill_started_s),
            _earliest(self.first_token_s, other.first_token_s),
            _earliest(self.transferred_s, other.transferred_s),
            max((t for t in (self.last_token_s, other.last_token_s) if t is not None), default=None),
            max(self.output_tokens, other.output_tokens),
            min((end for end in (self.end, other.end) if end is not None), default=None),
        )

    @property
    def holds(self) -> End | None:
        """Its end; an expiry is none once something was heard of it since."""
        end = self.end
        return None if end is None or (end.expired and self.expires_at_s > end.at_s) else end


def _earliest(one: float | None, other: float | None) -> float | None:
    return min((t for t in (one, other) if t is not None), default=None)


class Reservation(msgspec.Struct, frozen=True):
    """A request that was taken."""

    terms: Terms
    progress: Progress

    @property
    def stage(self) -> Stage:
        """Where it is."""
        progress = self.progress
        if progress.holds:
            return "ended"
        if progress.first_token_s is not None or progress.transferred_s is not None or progress.output_tokens:
            return "decode"
        return "waiting" if progress.prefill_started_s is None else "prefill"

    def moved(self, progress: Progress) -> "Reservation":
        """The same, with what was heard besides."""
        return Reservation(self.terms, self.progress.merged(progress))


def telemetry_of(reservation: Reservation) -> RequestRow | None:
    """Prediction and outcome of one that has ended; None where its end is no outcome."""
    terms, progress = reservation.terms, reservation.progress
    end = progress.holds
    if end is None or end.how not in _STATUS:
        return None
    first_s, last_s, tokens = progress.first_token_s, progress.last_token_s, progress.output_tokens
    per_token_s = None
    if first_s is not None and last_s is not None and tokens > 1 and last_s > first_s:
        per_token_s = tpot_s(first_s, last_s, float(tokens))
    gpu, model, precision, tp, ep, engine = terms.profile
    return RequestRow(
        terms.prompt_tokens,
        terms.cached_tokens / terms.prompt_tokens,
        terms.met.kv_cache_usage,
        terms.met.requests_running,
        terms.met.requests_waiting,
        terms.met.prefill_tokens_in_flight,
        terms.met.decode_tokens_in_flight,
        ttft_ms=_ms(None if first_s is None else first_s - terms.arrival_s),
        tpot_ms=_ms(per_token_s),
        predicted_ttft_ms=_ms(terms.predicted_ttft_s),
        predicted_tpot_ms=_ms(terms.predicted_tpot_s),
        model_version=terms.model_version,
        output_tokens=tokens or None,
        request_id=terms.request_id,
        tenant=terms.tenant,
        slo_class=terms.slo_class,
        gpu=gpu,
        model=model,
        precision=precision,
        tp=tp,
        ep=ep,
        engine=engine,
        arrived_at_s=terms.arrival_s,
        status=_STATUS[end.how],
        ttft_target_ms=_ms(terms.ttft_target_s),
        tpot_target_ms=_ms(terms.tpot_target_s),
        wait_ms=None if progress.prefill_started_s is None else (progress.prefill_started_s - terms.arrival_s) * 1e3,
        strategy=terms.strategy,
        prefill_instance=terms.prefill_instance,
        decode_instance=terms.decode_instance,
    )


def _ms(seconds: float | None) -> float | None:
    """Milliseconds of a duration that takes any time at all."""
    return None if seconds is None or seconds <= 0 else seconds * 1e3
