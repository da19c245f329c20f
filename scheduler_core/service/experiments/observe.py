"""From stored requests and reports to the pair that one coin decided about. Pure: the same rows give the same pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from msgspec import structs

from kairos.scheduler_core.experiment import Schedule, Slot
from kairos.scheduler_core.replay import Arrivals, Replayed
from kairos.scheduler_core.service.experiments.design import Pair, Plan, Side, counted
from kairos.scheduler_core.service.experiments.marks import shares
from kairos.scheduler_core.service.experiments.outcomes import Outcomes
from kairos.scheduler_core.slo import BoolArray

Ask = Callable[[Arrivals], Replayed | None]
"""A replay of the champion; None: it failed."""


class ArmReported(msgspec.Struct, frozen=True):
    """What data planes did for the requests of one arm in one slot."""

    requests: int = 0
    decisions: int = 0
    counted_decisions: int = 0
    wrong_arm: int = 0
    exceptions: int = 0
    fallbacks: int = 0
    decision_p99_us: float = 0.0
    worst_wait_s: float = 0.0

    def __add__(self, other: "ArmReported") -> "ArmReported":
        """Of both data planes; quantiles and worst cases are the worse one's."""
        return ArmReported(
            self.requests + other.requests,
            self.decisions + other.decisions,
            self.counted_decisions + other.counted_decisions,
            self.wrong_arm + other.wrong_arm,
            self.exceptions + other.exceptions,
            self.fallbacks + other.fallbacks,
            max(self.decision_p99_us, other.decision_p99_us),
            max(self.worst_wait_s, other.worst_wait_s),
        )


class SlotReported(msgspec.Struct, frozen=True):
    """What one data plane did in one slot."""

    slot_start_s: float
    champion: ArmReported | None = None
    challenger: ArmReported | None = None
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """Everything that is known about a pair: requests from one block before it to its end, and what was reported."""

    requests: Outcomes
    replayed: Replayed | None
    """Of the champion on the same requests."""
    reports: Sequence[SlotReported]
    known_sessions: frozenset[str] = frozenset()
    """`sticky`: seen before the pair, so not first seen in it."""
    arms_before: str | None = None
    """Of the slot before the pair."""


def lead_s(plan: Plan) -> float:
    """How much before a pair is looked at: the work that it begins with, and what a covariate is taken from."""
    return plan.lengths.block_s * (2 if plan.covariate_before_pair else 1)


def seen(
    plan: Plan,
    requests: Outcomes,
    ask: Ask | None,
    reports: Sequence[SlotReported] = (),
    known_sessions: frozenset[str] = frozenset(),
    arms_before: str | None = None,
) -> Window:
    """What is known about a pair, its replay asked for."""
    replayed = ask(requests.arrivals(plan.marks.typical_output_tokens)) if plan.covariate == "replay" and ask else None
    return Window(requests, replayed, reports, known_sessions, arms_before)


def pair_of(plan: Plan, schedule: Schedule, slots: Sequence[Slot], window: Window) -> Pair:
    """What was observed in the slots of a pair."""
    requests = window.requests
    during = (requests.arrival_s >= slots[0].start_s) & (requests.arrival_s < slots[-1].end_s)
    load = float(requests.prompt_tokens[during].sum()) / (slots[-1].end_s - slots[0].start_s)
    first, second = _sides(plan, schedule, slots, window)
    if plan.covariate_before_pair:
        start_s, block_s = slots[0].start_s, plan.lengths.block_s
        before = [_replayed(window, start_s - k * block_s, start_s - (k - 1) * block_s) for k in (1, 2)]
        first, second = (structs.replace(side, replayed=x) for side, x in zip((first, second), before, strict=True))
    return Pair(i=slots[0].pair or 0, first=first, second=second, load=load, share=slots[0].share)


def _sides(plan: Plan, schedule: Schedule, slots: Sequence[Slot], window: Window) -> tuple[Side, Side]:
    requests = window.requests
    if plan.design == "switchback":
        before = [window.arms_before, slots[0].arms]
        late = [_contaminated(requests, slot, 0, arms) for slot, arms in zip(slots, before, strict=True)]
        masks = [counted(requests.arrival_s, slot, plan.lengths) for slot in slots]
        ends = [_side(plan, slot, slot.arms, masks[k], late[k], window) for k, slot in enumerate(slots)]
        return ends[0], ends[1]
    slot = slots[0]
    inside = counted(requests.arrival_s, slot, plan.lengths)
    if plan.design == "pools":
        pools = [inside & (requests.pool == pool) for pool in (0, 1)]
        late = [_contaminated(requests, slot, pool, window.arms_before) for pool in (0, 1)]
        sides = [_side(plan, slot, slot.arms[pool], pools[pool], late[pool], window) for pool in (0, 1)]
        return sides[0], sides[1]
    new = np.array([bool(s) and s not in window.known_sessions for s in requests.session.tolist()], np.bool_)
    drawn = {
        session: schedule.strategy_of(session, slot.start_s) == plan.challenger
        for session in set(requests.session[inside & new].tolist())
    }
    challenger = np.array([drawn.get(session, False) for session in requests.session.tolist()], np.bool_)
    nobody = np.zeros(len(requests), np.bool_)
    return (
        _side(plan, slot, "B", inside & new & challenger, nobody, window),
        _side(plan, slot, "A", inside & new & ~challenger, nobody, window),
    )


def _side(plan: Plan, slot: Slot, arm: str, mask: BoolArray, contaminated: BoolArray, window: Window) -> Side:
    mine = window.requests.take(mask)
    reported = reported_for(window.reports, slot, arm)
    # sessions that a sticky slot does not count are in its reports all the same
    unresolved = max(0, reported.requests - len(mine)) if plan.design != "sticky" else 0
    decisions, wrong = reported.counted_decisions, reported.wrong_arm
    if not decisions:
        told = mine.strategy != ""
        ours = plan.challenger if arm == "B" else plan.champion
        decisions, wrong = int(told.sum()), int((told & (mine.strategy != ours)).sum())
    _, sizes = np.unique(mine.session[mine.session != ""].astype(np.str_), return_counts=True)
    return Side(
        counted=len(mine) + unresolved,
        met=int(mine.met.sum()),
        replayed=_mean(window, mask),
        offered=float(mine.prompt_tokens.sum()),
        contaminated=int((mask & contaminated).sum()),
        decisions=decisions,
        wrong_arm=wrong,
        unresolved=unresolved,
        sessions=len(sizes),
        squares=int((sizes**2).sum()),
        shares=shares(plan.marks, mine),
    )


def _mean(window: Window, mask: BoolArray) -> float | None:
    """Attainment of the replayed champion on some of the requests."""
    return float(window.replayed.met[mask].mean()) if window.replayed is not None and mask.any() else None


def _replayed(window: Window, from_s: float, until_s: float) -> float | None:
    return _mean(window, (window.requests.arrival_s >= from_s) & (window.requests.arrival_s < until_s))


def _contaminated(requests: Outcomes, slot: Slot, pool: int, arms_before: str | None) -> BoolArray:
    """Which waited while one from before a switch of strategy had no first token yet."""
    if arms_before is None or not arms_before or arms_before[pool] == slot.arms[pool]:
        return np.zeros(len(requests), np.bool_)
    queue = requests.pool == pool if len(slot.arms) > 1 else np.ones(len(requests), np.bool_)
    earlier = queue & (requests.arrival_s < slot.start_s)
    cleared_s = requests.prefilled_s[earlier].max(initial=-np.inf)
    waited = np.nan_to_num(requests.wait_s) > 0.0
    after: BoolArray = queue & waited & (requests.arrival_s >= slot.start_s) & (requests.arrival_s < cleared_s)
    return after


def reported_for(reports: Sequence[SlotReported], slot: Slot, arm: str) -> ArmReported:
    """The sum of what data planes said of an arm in a slot."""
    total = ArmReported()
    for report in reports:
        told = report.challenger if arm == "B" else report.champion
        if told is not None and abs(report.slot_start_s - slot.start_s) < 1e-3:
            total += told
    return total
