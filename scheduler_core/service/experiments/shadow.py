"""Shadow: what a challenger would have decided, and what the model says of it. Pure; it acts on nothing.

It says "predicted" and "by replay", never that attainment would have been better: the challenger never saw the queue it
would have made (docs/statistics.md).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from scipy.stats import kendalltau
from scipy.stats import t as student

from kairos.scheduler_core.service.experiments.observe import Ask
from kairos.scheduler_core.service.experiments.outcomes import Outcomes
from kairos.scheduler_core.service.schemas import Answer
from kairos.scheduler_core.slo import FloatArray

Disagreement = Literal["admission", "placement", "order", "batch"]
KINDS: tuple[Disagreement, ...] = ("admission", "placement", "order", "batch")
FEWEST_BATCHES, MOST_BATCHES = 10, 20
LARGEST_BIAS_PP = 2.0
SMALLEST_CORRELATION = 0.8


class ShadowPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed before the first sample."""

    id: str
    design: Literal["shadow"] = "shadow"
    champion: str
    challenger: str
    fixed_at: str
    max_hours: float = 48.0
    share: float = 0.05
    """Of decisions that are looked at."""


class Sample(msgspec.Struct, frozen=True):
    """Both strategies on one snapshot."""

    at_s: float
    disagreement: Disagreement | None
    """The first in the order of KINDS; None: the same next requests, instances and batches."""
    tau: float | None
    """Kendall's, of the order of the waiting requests; None: fewer than two."""
    waiting: int
    gain: int
    """Waiting requests predicted to be on time, challenger minus champion, without later arrivals."""
    hangs: bool
    """Whether the sign of the gain is another one with quick or with slow step times."""


class Block(msgspec.Struct, frozen=True):
    """A block of recorded arrivals: attainment as it was, and of both strategies replayed."""

    start_s: float
    requests: int
    real: float
    champion: float
    challenger: float


class Interval(msgspec.Struct, frozen=True):
    """A mean with its 95 % interval over blocks of time; none with fewer than 10 blocks."""

    mean: float
    low: float | None
    high: float | None


class Agreement(msgspec.Struct, frozen=True):
    """How alike both decide. It says nothing of quality."""

    decisions: int
    share: float
    disagreements: dict[str, int]
    kendall_tau: float | None


class ByReplay(msgspec.Struct, frozen=True):
    """Both strategies on recorded arrivals, and whether the replay of the champion is like the champion."""

    blocks: int
    trusted: bool
    bias_pp: float | None
    correlation: float | None
    difference_pp: Interval | None
    """Challenger minus champion; None where the replay is not trusted."""


class ShadowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a shadow found so far."""

    id: str
    design: Literal["shadow"] = "shadow"
    champion: str
    challenger: str
    verdict: Literal["shadow"] = "shadow"
    sentence: str
    started_at: str
    stopped_at: str | None
    agreement: Agreement
    predicted_on_time_per_1000_decisions: Interval
    hangs_on_estimate_share: float
    replay: ByReplay
    plan: ShadowPlan


def compared(at_s: float, champion: Answer, challenger: Answer, gains: tuple[int, int]) -> Sample:
    """Both answers to one snapshot.

    Args:
        gains: of the same snapshot with quick and with slow step times.
    """
    gain = on_time(challenger) - on_time(champion)
    places = {entry.request_id: place for place, entry in enumerate(champion.prefill)}
    order = [places[entry.request_id] for entry in challenger.prefill if entry.request_id in places]
    tau = float(kendalltau(order, sorted(order)).statistic) if len(order) > 1 else None
    hangs = len({_sign(each) for each in (gain, *gains)} - {0}) > 1
    return Sample(at_s, _disagreement(champion, challenger), tau, len(champion.prefill), gain, hangs)


def replayed_block(start_s: float, requests: Outcomes, champion: Ask | None, challenger: Ask | None) -> Block | None:
    """A block with both strategies replayed; None: nobody came, or a replay failed.

    Args:
        requests: from one block before it on.
    """
    during = requests.arrival_s >= start_s
    if champion is None or challenger is None or not during.any():
        return None
    known = requests.output_tokens[requests.output_tokens > 0]
    arrivals = requests.arrivals(int(np.median(known)) if len(known) else 1)
    a, b = champion(arrivals), challenger(arrivals)
    if a is None or b is None:
        return None
    real = float(requests.met[during].mean())
    return Block(start_s, int(during.sum()), real, float(a.met[during].mean()), float(b.met[during].mean()))


def on_time(answer: Answer) -> int:
    """Waiting requests that the plan of an answer serves within their TTFT target."""
    return sum(entry.on_time for entry in answer.prefill if entry.on_time is not None)


def _disagreement(a: Answer, b: Answer) -> Disagreement | None:
    def started(answer: Answer) -> set[tuple[object, str]]:
        return {(entry.request_id, entry.instance_id) for entry in answer.prefill if entry.step_tokens}

    def placed(answer: Answer) -> set[tuple[object, str]]:
        return {(placement.request_id, placement.instance_id) for placement in answer.placements}

    if {r.request_id for r in a.rejected} != {r.request_id for r in b.rejected}:
        return "admission"
    elsewhere = started(a) != started(b) and {who for who, _ in started(a)} == {who for who, _ in started(b)}
    if elsewhere or placed(a) != placed(b):
        return "placement"
    if started(a) != started(b):
        return "order"
    batches = [{d.instance_id: (d.swap_out, d.admit, d.step) for d in answer.decode} for answer in (a, b)]
    return "batch" if batches[0] != batches[1] else None


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def shadow_record(
    plan: ShadowPlan, samples: Sequence[Sample], blocks: Sequence[Block], started_at: str, stopped_at: str | None
) -> ShadowRecord:
    """The record as it stands."""
    samples = sorted(samples, key=lambda sample: sample.at_s)
    kinds = Counter(sample.disagreement for sample in samples if sample.disagreement)
    taus = [sample.tau for sample in samples if sample.tau is not None and not math.isnan(sample.tau)]
    agreed = sum(sample.disagreement is None for sample in samples) / len(samples) if samples else 0.0
    gain = batch_interval(np.array([1000.0 * sample.gain for sample in samples]))
    replay = _by_replay(blocks)
    return ShadowRecord(
        id=plan.id,
        champion=plan.champion,
        challenger=plan.challenger,
        sentence=_sentence(len(samples), agreed, gain, replay),
        started_at=started_at,
        stopped_at=stopped_at,
        agreement=Agreement(
            len(samples), agreed, {kind: kinds[kind] for kind in KINDS}, float(np.mean(taus)) if taus else None
        ),
        predicted_on_time_per_1000_decisions=gain,
        hangs_on_estimate_share=sum(sample.hangs for sample in samples) / len(samples) if samples else 0.0,
        replay=replay,
        plan=plan,
    )


def batch_interval(values: FloatArray) -> Interval:
    """Mean of (n,) values in order of time; a t interval over 10 to 20 equal batches, wider as neighbours are alike.

    Source: docs/statistics.md, "Shadow".
    """
    mean = float(values.mean()) if len(values) else 0.0
    batches = min(MOST_BATCHES, len(values))
    if batches < FEWEST_BATCHES:
        return Interval(mean, None, None)
    means = np.array([part.mean() for part in np.array_split(values, batches)])
    centred = means - means.mean()
    squares = float(centred @ centred)
    alike = float(centred[1:] @ centred[:-1]) / squares if squares else 0.0
    r = min(max(alike + 1.0 / batches, 0.0), 0.9)
    error = float(means.std(ddof=1)) / math.sqrt(batches) * math.sqrt((1 + r) / (1 - r))
    half = float(student.ppf(0.975, batches - 1)) * error
    return Interval(mean, mean - half, mean + half)


def _by_replay(blocks: Sequence[Block]) -> ByReplay:
    if len(blocks) < FEWEST_BATCHES:
        return ByReplay(len(blocks), False, None, None, None)
    blocks = sorted(blocks, key=lambda block: block.start_s)
    real, champion = np.array([b.real for b in blocks]), np.array([b.champion for b in blocks])
    bias_pp = 100 * float((champion - real).mean())
    alike = float(np.corrcoef(real, champion)[0, 1]) if real.std() and champion.std() else 0.0
    trusted = abs(bias_pp) <= LARGEST_BIAS_PP and alike >= SMALLEST_CORRELATION
    gap = batch_interval(100 * (np.array([b.challenger for b in blocks]) - champion)) if trusted else None
    return ByReplay(len(blocks), trusted, bias_pp, alike, gap)


def _sentence(n: int, agreed: float, gain: Interval, replay: ByReplay) -> str:
    if not n:
        return "B did not act, and no decision has been looked at yet."
    span = "" if gain.low is None else f" ({gain.low:+.0f} to {gain.high:+.0f})"
    said = (
        f"B did not act; this is what our model says it would have done: the same as A in {agreed:.0%} of {n} "
        f"decisions, predicted {gain.mean:+.0f}{span} requests on time per 1,000 decisions."
    )
    if replay.difference_pp is not None:
        return f"{said} By replay {replay.difference_pp.mean:+.1f} points, champion bias {replay.bias_pp:.1f} points."
    if replay.blocks >= FEWEST_BATCHES:
        return f"{said} The replay is not trusted for this fleet."
    return said
