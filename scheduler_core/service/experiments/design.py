"""How an experiment is laid out before it starts: lengths, coins, stages, and which requests count.

Times are seconds on the fleet's one clock, handed in; nothing here reads a clock. The champion is arm A, the challenger
arm B.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Literal

import msgspec
import numpy as np

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.experiment import Schedule, Slot, drawn
from kairos.scheduler_core.slo import BoolArray, FloatArray

Design = Literal["switchback", "pools", "sticky"]

SHORTEST_BLOCK_S = 300.0
LONGEST_BLOCK_S = 3600.0
DRAINS_PER_BLOCK = 5
PROBE_S = 60.0
"""How long the challenger runs at a time in a stage too small for a pair."""
SMALLEST_PAIRED_SHARE = 0.05
SCHEDULE_S = 24 * 3600.0


class Lengths(msgspec.Struct, frozen=True):
    """How long a block is and which of its arrivals count; fixed before the start, equal for both arms."""

    block_s: float
    burn_s: float
    """Arrivals at the start that do not count: the other arm's work is still there. One drain, a fifth of a block."""
    tail_s: float
    """Arrivals at the end that do not count: they may be served by the next block's arm."""
    settle_s: float
    """How long after its end a block's last requests are known: longest TTFT target + p99.9 latency."""
    drain_p90_s: float


class Stage(msgspec.Struct, frozen=True):
    """A step of the ramp-up: the challenger's share of time (`sticky`: of new sessions), for so many pairs."""

    share: float
    pairs: int | None
    """None: until the experiment ends. A stage ends by exposure, never by a look at the gain."""


RAMP_UP = (Stage(0.01, 1), Stage(0.05, 2), Stage(0.25, 4), Stage(0.5, None))


class Alpha(msgspec.Struct, frozen=True):
    """Chance of a false alarm, by kind; together the 5 % of one experiment."""

    better: float = 0.02
    harm: float = 0.02
    guards: float = 0.01
    """Of all statistical guards together, split evenly."""

    def shared_by(self, challengers: int) -> "Alpha":
        """What each of several challengers gets."""
        return Alpha(self.better / challengers, self.harm / challengers, self.guards / challengers)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the champion's last 7 days and the settings allow in one block: the absolute guards."""

    error_rate_p999: float
    """Per block."""
    decision_budget_us: float
    ttft_target_s: float
    worst_wait_s: float


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """What shares of requests are compared with, from the champion's history."""

    long_wait_s: float | None = None
    """p99 of its waits; None: no wait was recorded."""
    prompt_quartiles_tokens: tuple[float, float, float] = (0.0, 0.0, 0.0)
    classes: tuple[str, ...] = ()
    """SLO classes with a share of the traffic that is worth a look."""
    worst_tenant_group: int | None = None
    typical_output_tokens: int = 1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is fixed before the first coin."""

    id: str
    design: Design
    champion: str
    challenger: str
    lengths: Lengths
    sigma: float
    """From `evidence.sigma_of` on the champion's history; when in doubt lower."""
    requests_per_pair: float
    """Of history: a pair with as many counted requests weighs 1."""
    load_bounds: tuple[float, float, float]
    """Quantiles .5, .75 and .9 of the last 7 days' offered load, in the unit of `Pair.load`."""
    seed: int
    max_hours: float
    fixed_at: str
    margin_pp: float = 1.0
    """Differences within this many points are no difference."""
    effect_pp: float = 2.0
    """What the time still to go is stated for."""
    alpha: Alpha = Alpha()
    stages: tuple[Stage, ...] = RAMP_UP
    guards: dict[str, float] = {}
    """Shares of requests that must not grow, by name, with their sigma."""
    groups: dict[str, float] = {}
    """Groups of requests whose attainment is shown, without a verdict, by name, with their sigma."""
    shared_queue: bool = False
    """`sticky` where both arms' requests wait in one queue: never `better`."""
    covariate_before_pair: bool = False
    """The covariate comes from the two blocks before the pair, since arrivals react to the arm."""
    covariate: Literal["replay", "offered"] = "replay"
    """Attainment of the replayed champion, or the prompt tokens that arrived."""
    marks: Marks = Marks()
    limits: Limits | None = None
    """None: absolute guards do not act."""

    @property
    def pair_s(self) -> float:
        """How long one coin rules: two blocks of a switchback, one block otherwise."""
        return self.lengths.block_s * (2 if self.design == "switchback" else 1)


def drain_p90_s(arrival_s: FloatArray, finished_s: FloatArray, late: BoolArray) -> float:
    """How long it takes until all that is present has been served: 90th percentile over late requests' arrivals.

    Over all arrivals where none is late. Over clock time it would miss the bursts.

    Args:
        arrival_s: (n,) ascending.
        finished_s: (n,) when each request's service ended.
        late: (n,) which requests missed their targets.
    """
    drain = np.maximum.accumulate(finished_s) - arrival_s
    return float(np.quantile(drain[late] if late.any() else drain, 0.9))


def lengths_for(drain_s: float, ttft_target_s: float, latency_p999_s: float) -> Lengths:
    """Block, burn-in and tail for a queue that drains in `drain_s`; `ttft_target_s` is the longest of all classes.

    Raises:
        InputError: the queue drains too slowly, or the target is too long, for blocks of an hour.

    >>> lengths_for(drain_s=100.0, ttft_target_s=8.0, latency_p999_s=30.0).block_s
    540.0
    """
    block_s = math.ceil(max(SHORTEST_BLOCK_S, DRAINS_PER_BLOCK * drain_s) / 60.0) * 60.0
    if block_s > LONGEST_BLOCK_S:
        raise InputError(
            f"not measurable by switchback: the queue drains in {drain_s:.0f} s, which needs blocks of {block_s:.0f} s,"
            f" more than {LONGEST_BLOCK_S:.0f}; use pools, or compare offline"
        )
    if drain_s + ttft_target_s > block_s / 2:
        raise InputError(
            f"a TTFT target of {ttft_target_s:.0f} s leaves less than half of a block of {block_s:.0f} s to count;"
            " use sticky, or leave that class out"
        )
    return Lengths(block_s, drain_s, ttft_target_s, ttft_target_s + latency_p999_s, drain_s)


def sticky_lengths(drain_s: float, ttft_target_s: float, latency_p999_s: float) -> Lengths:
    """The same for sessions, which never switch: nothing is left out at the start of a block."""
    block_s = max(SHORTEST_BLOCK_S, math.ceil(2 * ttft_target_s / 60.0) * 60.0)
    return Lengths(block_s, 0.0, ttft_target_s, ttft_target_s + latency_p999_s, drain_s)


def coin(plan: Plan, pair: int) -> int:
    """+1: the first block (pool 1) of this pair runs the challenger; -1: the second. Depends on nothing else."""
    return 1 if drawn(plan.id, plan.seed, f"pair {pair}") < 0.5 else -1


def coins(plan: Plan, pairs: Iterable[int]) -> str:
    """The coins of these pairs, as `+` and `-`."""
    return "".join("+" if coin(plan, pair) > 0 else "-" for pair in pairs)


def draw_schedule(plan: Plan, generation: int, start_s: float, from_s: float) -> Schedule:
    """The slots that touch the 24 h after `from_s`, of an experiment that started at `start_s`.

    Whoever draws it, and from whenever, a time and a pair have the same arm.
    """
    slots = slots_between(plan, start_s, from_s, from_s + SCHEDULE_S)
    return Schedule(plan.id, plan.seed, plan.champion, plan.challenger, generation, tuple(slots))


def slots_between(plan: Plan, start_s: float, from_s: float, until_s: float) -> list[Slot]:
    """The slots of an experiment, to its end, that begin before `until_s` and end after `from_s`, in order."""
    until_s = min(until_s, start_s + plan.max_hours * 3600.0)
    begun = takewhile(lambda slot: slot.start_s < until_s, _slots(plan, start_s))
    return [slot for slot in begun if slot.end_s > from_s]


def _slots(plan: Plan, now_s: float) -> Iterator[Slot]:
    """Without end: each round of a stage runs one pair (or one probe), then the champion until the share is kept."""
    nobody = "AA" if plan.design == "pools" else "A"
    pair = 0
    for stage in plan.stages:
        probe = stage.share < SMALLEST_PAIRED_SHARE
        done = 0
        while stage.pairs is None or done < stage.pairs:
            began_s, challenger_s = now_s, 0.0
            for slot in [_probe(plan, now_s, stage.share)] if probe else pair_slots(plan, pair, now_s, stage.share):
                yield slot
                now_s = slot.end_s
                challenger_s += (slot.end_s - slot.start_s) * slot.arms.count("B") / max(len(slot.arms), 1)
            rest_s = challenger_s / stage.share - (now_s - began_s)
            if rest_s > 1e-6:
                yield Slot(now_s, now_s + rest_s, nobody, stage.share, None)
                now_s += rest_s
            pair += 0 if probe else 1
            done += 1


def pair_slots(plan: Plan, pair: int, start_s: float, share: float) -> tuple[Slot, ...]:
    """The slots of a pair that begins at `start_s`."""
    block_s, first = plan.lengths.block_s, coin(plan, pair) > 0
    if plan.design != "switchback":
        arms = "" if plan.design == "sticky" else "BA" if first else "AB"
        return (Slot(start_s, start_s + block_s, arms, share, pair),)
    middle_s = start_s + block_s
    earlier = Slot(start_s, middle_s, "B" if first else "A", share, pair)
    return earlier, Slot(middle_s, middle_s + block_s, "A" if first else "B", share, pair)


def _probe(plan: Plan, start_s: float, share: float) -> Slot:
    """The same for a stage too small to be judged: only absolute guards look at it."""
    if plan.design == "sticky":
        return Slot(start_s, start_s + plan.lengths.block_s, "", share, None)
    return Slot(start_s, start_s + PROBE_S, "B" if plan.design == "switchback" else "AB", share, None)


def counted(arrival_s: FloatArray, slot: Slot, lengths: Lengths) -> BoolArray:
    """Which arrivals count for a slot, (n,): neither in the burn-in nor in the tail, whatever became of them."""
    return (arrival_s >= slot.start_s + lengths.burn_s) & (arrival_s < slot.end_s - lengths.tail_s)


def closed_pairs(plan: Plan, start_s: float, now_s: float) -> list[tuple[Slot, ...]]:
    """The slots of each pair whose outcome is fully known, in order; requests that end early are the lucky ones."""
    pairs: dict[int, list[Slot]] = {}
    for slot in slots_between(plan, start_s, start_s, now_s - plan.lengths.settle_s):
        if slot.pair is not None and slot.end_s + plan.lengths.settle_s <= now_s:
            pairs.setdefault(slot.pair, []).append(slot)
    whole = 2 if plan.design == "switchback" else 1
    return [tuple(slots) for slots in pairs.values() if len(slots) == whole]


def champion_pairs(plan: Plan, start_s: float, now_s: float) -> list[tuple[Slot, ...]]:
    """Pairs of closed blocks in which the champion ran alone, numbered and with coins as if one were a challenger.

    What they say is known beforehand, nothing: so they tell whether the method is well.
    """
    mock = mock_of(plan)
    pairs: list[tuple[Slot, ...]] = []
    for slot in slots_between(plan, start_s, start_s, now_s):
        alone = slot.pair is None and slot.arms and "B" not in slot.arms
        blocks_from_s = slot.start_s
        while alone and blocks_from_s + plan.pair_s <= min(slot.end_s, now_s - plan.lengths.settle_s):
            pairs.append(pair_slots(mock, len(pairs), blocks_from_s, 0.5))
            blocks_from_s += plan.pair_s
    return pairs


def mock_of(plan: Plan) -> Plan:
    """The plan with the champion against itself, and coins of its own."""
    half = (Stage(0.5, None),)
    return msgspec.structs.replace(plan, id=f"{plan.id}/champion", challenger=plan.champion, stages=half)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a pair: a block, a pool in a block, or one arm's sessions first seen in a block.

    Requests count for the arm that the coin gave them; rejected, failed and unfinished ones missed their targets.
    """

    counted: int
    met: int
    replayed: float | None = None
    """Covariate: attainment of the champion replayed on the same arrivals. It sees arrivals and prompts only."""
    offered: float = 0.0
    """Prompt tokens of the counted requests: the covariate without replays."""
    contaminated: int = 0
    """Counted requests that waited while one from before the switch was unfinished."""
    decisions: int = 0
    wrong_arm: int = 0
    """Decisions after the burn-in that the other strategy made."""
    unresolved: int = 0
    """Counted requests that data planes told of, without an outcome when the pair closed: they missed."""
    sessions: int = 0
    squares: int = 0
    """Sum over sessions of their counted requests squared."""
    shares: dict[str, tuple[int, int]] = {}
    """(hits, counted) of each guard (hits are bad) and group (hits met their targets)."""

    @property
    def attainment(self) -> float:
        """Share of counted requests that met their targets; NaN with none."""
        return self.met / self.counted if self.counted else math.nan

    def share(self, name: str | None) -> tuple[int, int]:
        """(hits, counted) of a guard or group; None: requests that met their targets, of all."""
        return (self.met, self.counted) if name is None else self.shares.get(name, (0, 0))


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """What one coin decided about."""

    i: int
    first: Side
    """First block or pool 1; for `sticky` the challenger's sessions."""
    second: Side
    load: float
    """Offered load, known before any outcome."""
    share: float
    """The stage's."""
