"""What the challenger does in a slot, for the guards that need no statistics."""

from collections.abc import Sequence

import numpy as np

from kairos.scheduler_core.experiment import Slot
from kairos.scheduler_core.service.experiments.design import Limits, Plan
from kairos.scheduler_core.service.experiments.observe import Ask, SlotReported, reported_for
from kairos.scheduler_core.service.experiments.outcomes import FAILED, Outcomes
from kairos.scheduler_core.service.experiments.verdict import BlockHealth, Breach, absolute_breaches, wait_limit_s
from kairos.scheduler_core.slo import BoolArray


def serves_challenger(slot: Slot) -> bool:
    """Whether any request may go to the challenger in a slot."""
    return not slot.arms or "B" in slot.arms


def breaches_of(
    plan: Plan, limits: Limits, slot: Slot, requests: Outcomes, reports: Sequence[SlotReported], ask: Ask | None
) -> list[Breach]:
    """The guards that act on a slot so far.

    Args:
        requests: from one block before the slot on.
        ask: a replay of the champion, asked only about a wait that is too long; None: such a wait is blamed on nobody.
    """
    mine = _of_challenger(plan, slot, requests)
    reported = reported_for(reports, slot, "B")
    waits = np.nan_to_num(requests.wait_s[mine])
    worst_s = max(float(waits.max(initial=0.0)), reported.worst_wait_s)
    replayed_s = worst_s
    if worst_s > wait_limit_s(limits) and ask is not None:
        replayed = ask(requests.arrivals(plan.marks.typical_output_tokens))
        during = requests.arrival_s >= slot.start_s
        if replayed is not None:
            replayed_s = float(replayed.wait_s[during].max(initial=0.0))
    health = BlockHealth(
        requests=int(mine.sum()),
        errors=int((requests.status[mine] == FAILED).sum()),
        decisions=reported.decisions,
        exceptions=reported.exceptions,
        fallbacks=reported.fallbacks,
        decision_p99_us=reported.decision_p99_us,
        healthy=all(report.healthy for report in reports if abs(report.slot_start_s - slot.start_s) < 1e-3),
        worst_wait_s=worst_s,
        replayed_worst_wait_s=replayed_s,
    )
    return absolute_breaches(health, limits)


def _of_challenger(plan: Plan, slot: Slot, requests: Outcomes) -> BoolArray:
    during: BoolArray = (requests.arrival_s >= slot.start_s) & (requests.arrival_s < slot.end_s)
    if not slot.arms:
        during &= requests.strategy == plan.challenger
    elif len(slot.arms) > 1:
        during &= requests.pool == slot.arms.index("B")
    return during
