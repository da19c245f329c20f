"""Why a request waited, where it went, and what was predicted against what happened: as data, and in plain words."""

from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec
import numpy as np

from kairos.scheduler_core.decision import Reason, Standing
from kairos.scheduler_core.service.decisions.record import DecisionRecord, Spread, unpack
from kairos.scheduler_core.service.store.queries.decisions import DecisionRow, KeptFor, Outcome
from kairos.scheduler_core.slo import ttft_met


class RecordedDecision(msgspec.Struct, frozen=True):
    """A decision about the request, as it was made."""

    decided_at: datetime
    decision_id: str
    kept_for: KeptFor
    record: DecisionRecord


class Happened(msgspec.Struct, frozen=True):
    """What telemetry says became of it; null: not told."""

    status: str
    wait_s: float | None
    ttft_s: float | None
    predicted_ttft_s: float | None
    ttft_target_s: float | None
    tpot_s: float | None
    predicted_tpot_s: float | None
    tpot_target_s: float | None
    output_tokens: int | None
    prefill_instance: str | None
    decode_instance: str | None
    strategy: str | None
    model_version: str


class Explanation(msgspec.Struct, frozen=True):
    """What is known of a request."""

    request_id: str
    text: list[str]
    """The same in words, a sentence or two each."""
    decisions: list[RecordedDecision]
    happened: Happened | None
    """Null: no telemetry of it was stored."""


def explain(request_id: str, rows: Sequence[DecisionRow], outcome: Outcome | None) -> Explanation:
    """What was recorded of a request, beside what became of it."""
    decisions = [RecordedDecision(row.decided_at, row.decision_id, row.kept_for, unpack(row.body)) for row in rows]
    happened = None if outcome is None else Happened(*(getattr(outcome, name) for name in Happened.__struct_fields__))
    return Explanation(request_id, list(_words(decisions, happened)), decisions, happened)


def _words(decisions: Sequence[RecordedDecision], happened: Happened | None) -> Iterator[str]:
    for number, decision in enumerate(decisions):
        record = decision.record
        at = f"{decision.decided_at:%Y-%m-%d %H:%M:%S.%f}"[:-3]
        yield f"{at} UTC, {_KEPT_FOR[decision.kept_for]}. {_chosen(record)}"
        if number == 0:
            yield from _circumstances(record)
        if record.elsewhere:
            yield _elsewhere(record)
    predicted = [d.record.predicted_ttft_s for d in decisions if d.record.predicted_ttft_s is not None]
    yield _happened(happened, predicted[-1] if predicted else None)


_KEPT_FOR: dict[KeptFor, str] = {
    "rejected": "it was rejected",
    "failed": "a policy failed",
    "guarded": "a guard gave it its turn",
    "missed": "it was predicted to be late",
    "long_wait": "it had waited long",
    "sampled": "it belongs to the sample",
}


def _chosen(record: DecisionRecord) -> str:
    if record.status is not None:
        again = "" if record.retry_after_s is None else f"; it may come back after {record.retry_after_s} s"
        return f"It was not taken: {record.code} (status {record.status}){again}."
    if record.stage == "decode":
        step = f", whose next step takes {_s(record.predicted_step_s)}" if record.predicted_step_s else ""
        return f"It went to {record.instance_id} for decode{step}."
    predicted = f"its first token was predicted {_s(record.predicted_ttft_s)} after its arrival, {_verdict(record)}"
    if record.stage == "admission":
        decode = f" and {record.decode_instance_id}" if record.decode_instance_id else ""
        return f"It was sent to {record.instance_id}{decode}, {_behind(record)}; {predicted}."
    waited = f"It had waited {_s(record.waited_s)}"
    if record.code == Standing.RUNS_NEXT:
        by = _CHOSEN_BY.get(record.chosen_by, record.chosen_by)
        return f"{waited} and began on {record.instance_id}: {by}; {predicted}."
    if record.code == Standing.LOST:
        over = "" if record.laxity_s is None else f" (by {_s(-record.laxity_s)})"
        return (
            f"{waited} and could not be in time any more, even if it ran at once{over}, so it was left to wait on "
            f"{record.instance_id}, {_behind(record)}; {predicted}."
        )
    return f"{waited} and was to run on {record.instance_id}, {_behind(record)}; {predicted}."


_CHOSEN_BY: dict[str, str] = {
    Reason.POLICY: "the policy put it first",
    Reason.CONTINUES: "its prompt was begun and goes on",
    Reason.LOST_LAST: "only requests that are late anyway waited, and it was the oldest",
    Reason.SHARE_GUARD: "the share guard gave it time that requests passed over are sure of",
    Reason.FALLBACK: "the policy failed, and it was the first to arrive",
    Reason.NOT_CONTROLLED: "the engine chose it",
}


def _behind(record: DecisionRecord) -> str:
    if not record.ahead_requests and record.ahead_s <= 0:
        return "with nobody before it"
    others = f"{record.ahead_requests} other{'s' if record.ahead_requests != 1 else ''}"
    return f"behind {others}, {_s(record.ahead_s)} of work"


def _verdict(record: DecisionRecord) -> str:
    if record.ttft_target_s is None:
        return "without a target"
    target = f"its target of {_s(record.ttft_target_s)}"
    return f"in time for {target}" if record.on_time else f"too late for {target}"


def _circumstances(record: DecisionRecord) -> Iterator[str]:
    rule, queue, asked = record.rule, record.queue, record.asked
    cached = f", {asked.cached_tokens:,} of them cached" if asked.cached_tokens else ""
    alone = "" if record.predicted_prefill_s is None else f"; alone its prompt takes {_s(record.predicted_prefill_s)}"
    yield f"The request: {asked.prompt_tokens:,} prompt tokens{cached}{alone}."
    yield (
        f"Waiting then: {queue.tokens.count} requests, {queue.late} of them predicted late; prompts of "
        f"{_spread(queue.tokens)} tokens; {queue.running} were in prefill, {queue.transferred} on their way to decode, "
        f"{queue.resident} in decode."
    )
    yield f"The rule: strategy {rule.strategy} ({rule.policies}); times from {rule.model_version or 'no model'}."
    if rule.failures:
        yield f"Policies that failed and were replaced: {', '.join(rule.failures)}."
    if record.first:
        named = ", ".join(f"{f.request_id} ({_s(f.prefill_s)})" for f in record.first)
        more = record.ahead_requests - len(record.first)
        yield f"Before it: {named}{f' and {more} more' if more > 0 else ''}."


def _elsewhere(record: DecisionRecord) -> str:
    what = "a decode step takes" if record.stage == "decode" else "its first token would come after"
    named = ", ".join(f"{e.instance_id} {_s(e.seconds)} ({e.requests} requests)" for e in record.elsewhere)
    rest = record.elsewhere_rest
    more = f"; {rest.count} more between {_s(record.elsewhere[-1].seconds)} and {_s(rest.most)}" if rest.count else ""
    return f"Elsewhere {what}: {named}{more}."


def _happened(happened: Happened | None, predicted_ttft_s: float | None) -> str:
    if happened is None:
        return "What became of it was not reported: no telemetry of this request is stored."
    parts = [f"What happened: {happened.status}"]
    where = " and ".join(name for name in (happened.prefill_instance, happened.decode_instance) if name)
    if where:
        parts.append(f"on {where}")
    if happened.wait_s is not None:
        parts.append(f"prefill began after {_s(happened.wait_s)}")
    if happened.ttft_s is not None:
        predicted_s = happened.predicted_ttft_s or predicted_ttft_s
        parts.append(f"first token after {_s(happened.ttft_s)}" + _against(happened.ttft_s, predicted_s))
        if happened.ttft_target_s is not None:
            met = ttft_met(np.array([happened.ttft_s]), np.array([happened.ttft_target_s]))[0]
            parts.append(f"the target of {_s(happened.ttft_target_s)} was {'met' if met else 'missed'}")
    if happened.tpot_s is not None:
        parts.append(f"{happened.tpot_s * 1e3:.1f} ms a token" + _against(happened.tpot_s, happened.predicted_tpot_s))
    return ", ".join(parts) + "."


def _against(actual_s: float, predicted_s: float | None) -> str:
    if predicted_s is None:
        return ""
    share = 100 * (actual_s / predicted_s - 1)
    return f" ({abs(share):.0f} % {'later' if share > 0 else 'earlier'} than the {_s(predicted_s)} predicted)"


def _spread(spread: Spread) -> str:
    return f"{spread.p50:,.0f} (half), up to {spread.p90:,.0f} (90 %), at most {spread.most:,.0f}"


def _s(seconds: float | None) -> str:
    """Seconds as people read them.

    >>> _s(0.0123), _s(1.25), _s(312.0)
    ('12.3 ms', '1.25 s', '312 s')
    """
    if seconds is None:
        return "?"
    if abs(seconds) < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 100 else f"{seconds:.0f} s"
