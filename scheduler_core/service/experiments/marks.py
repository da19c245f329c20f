"""Shares of requests beside attainment: guards, whose hits are bad, and groups, whose hits met their targets."""

import numpy as np

from kairos.scheduler_core.service.experiments.design import Marks
from kairos.scheduler_core.service.experiments.outcomes import FAILED, FINISHED, TENANT_GROUPS, Outcomes
from kairos.scheduler_core.slo import BoolArray

SMALLEST_CLASS_SHARE = 0.05
ERRORS, LONG_WAITS, LONGEST_PROMPTS = "error rate", "waits over the champion's p99", "missed, longest prompts"


def marks_of(history: Outcomes) -> Marks:
    """What shares are compared with, from the champion's history."""
    met, fewest = history.met, SMALLEST_CLASS_SHARE * len(history)
    names, counts = np.unique(history.slo_class.astype(np.str_), return_counts=True)
    classes = tuple(str(n) for n, count in zip(names, counts, strict=True) if n and count >= fewest)
    grouped = [(history.tenant_group == group, group) for group in range(TENANT_GROUPS)]
    busy = [(met[mask].mean(), group) for mask, group in grouped if mask.sum() >= fewest]
    waits = history.wait_s[~np.isnan(history.wait_s)]
    outputs = history.output_tokens[(history.status == FINISHED) & (history.output_tokens > 0)]
    low, middle, high = np.quantile(history.prompt_tokens, (0.25, 0.5, 0.75))
    return Marks(
        long_wait_s=float(np.quantile(waits, 0.99)) if len(waits) else None,
        prompt_quartiles_tokens=(float(low), float(middle), float(high)),
        classes=classes if len(classes) > 1 else (),
        worst_tenant_group=min(busy)[1] if len(busy) > 1 else None,
        typical_output_tokens=int(np.median(outputs)) if len(outputs) else 1,
    )


def guard_names(marks: Marks) -> list[str]:
    """Of the shares that must not grow."""
    names = [ERRORS, LONGEST_PROMPTS]
    names += [LONG_WAITS] if marks.long_wait_s is not None else []
    names += [f"missed, class {name}" for name in marks.classes]
    names += [] if marks.worst_tenant_group is None else [f"missed, tenant group {marks.worst_tenant_group}"]
    return names


def group_names(marks: Marks) -> list[str]:
    """Of the groups whose attainment is shown."""
    return [f"prompt quartile {quartile}" for quartile in (1, 2, 3, 4)] + [f"class {name}" for name in marks.classes]


def shares(marks: Marks, side: Outcomes) -> dict[str, tuple[int, int]]:
    """(hits, counted) of every guard and group on one side of a pair."""
    met, everyone = side.met, np.ones(len(side), np.bool_)
    quartile = np.searchsorted(np.array(marks.prompt_quartiles_tokens), side.prompt_tokens, side="left")
    found = {ERRORS: _share(side.status == FAILED, everyone), LONGEST_PROMPTS: _share(~met, quartile == 3)}
    if marks.long_wait_s is not None:
        found[LONG_WAITS] = _share(side.wait_s > marks.long_wait_s, everyone)
    for k in range(4):
        found[f"prompt quartile {k + 1}"] = _share(met, quartile == k)
    for name in marks.classes:
        found[f"missed, class {name}"] = _share(~met, side.slo_class == name)
        found[f"class {name}"] = _share(met, side.slo_class == name)
    if marks.worst_tenant_group is not None:
        mine = side.tenant_group == marks.worst_tenant_group
        found[f"missed, tenant group {marks.worst_tenant_group}"] = _share(~met, mine)
    return found


def _share(hits: BoolArray, of: BoolArray) -> tuple[int, int]:
    return int((hits & of).sum()), int(of.sum())
