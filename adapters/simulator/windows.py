"""One window of a run to look at: where a long prompt held an instance and others waited behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos.adapters.simulator.run import StepRow
from kairos.adapters.simulator.tables import RequestTable

_BEFORE, _AFTER = 0.1, 1.0
"""How much is shown around a block, as shares of its length."""
_REQUESTS_SHOWN = 40

RULE = (
    "the stretch in which one prompt held an instance of the baseline and the most requests arrived behind it "
    "that then missed their TTFT target"
)


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time on one instance, the row of the request that held it, and who was there."""

    instance: int
    start_s: float
    end_s: float
    blocker: int
    rows: Sequence[int]
    """Who ran or waited there meanwhile, at most 40 of them."""


def worst_blocking(table: RequestTable, steps: Sequence[StepRow]) -> Window | None:
    """The worst head-of-line blocking of a run (`RULE`); None when nobody was late behind anyone."""
    late = ~table.ttft_met & np.isfinite(table.first_token_s)
    arrival_s = table.workload.arrival_s
    worst, most = None, 0
    for hold in _holds(steps):
        _, instance, start_s, end_s = hold
        behind = late & (table.prefill_instance == instance) & (arrival_s > start_s) & (arrival_s < end_s)
        count = int(np.sum(behind))
        if count > most:
            worst, most = hold, count
    if worst is None:
        return None
    blocker, instance, start_s, end_s = worst
    length_s = end_s - start_s
    start_s, end_s = start_s - _BEFORE * length_s, end_s + _AFTER * length_s
    ran = {row for step in _within(steps, start_s, end_s) if step.instance == instance for row in step.request_ids}
    here = (table.prefill_instance == instance) & (arrival_s < end_s) & (table.first_token_s > start_s)
    waited = set(np.flatnonzero(here).tolist())
    rows = sorted(ran | waited, key=lambda row: (row != blocker, row not in ran, row))
    return Window(instance, start_s, end_s, blocker, sorted(rows[:_REQUESTS_SHOWN]))


def timeline(table: RequestTable, steps: Sequence[StepRow], window: Window) -> dict[str, Any]:
    """What became of the requests of a window, on whatever instance, as results.json holds it."""
    w = table.workload
    rows = set(window.rows)
    shown = [step for step in _within(steps, window.start_s, window.end_s) if rows & set(step.request_ids)]
    instances = sorted({step.instance for step in shown}) or [window.instance]
    return {
        "instance": ", ".join(f"prefill-{index}" for index in instances),
        "rule": RULE,
        "start_s": window.start_s,
        "end_s": window.end_s,
        "blocker": w.request_id[window.blocker],
        "steps": [
            {
                "start_s": step.start_s,
                "end_s": step.end_s,
                "request_ids": [w.request_id[row] for row in step.request_ids if row in rows],
                "new_tokens": sum(step.tokens),
            }
            for step in shown
        ],
        "requests": [
            {
                "request_id": w.request_id[row],
                "arrival_s": float(w.arrival_s[row]),
                "deadline_s": float(w.arrival_s[row] + w.ttft_target_s[row]),
                "start_s": _known(table.prefill_start_s[row]),
                "first_token_s": _known(table.first_token_s[row]),
                "prompt_tokens": int(w.prompt_tokens[row]),
                "ttft_met": bool(table.ttft_met[row]),
            }
            for row in window.rows
        ],
    }


def _within(steps: Sequence[StepRow], start_s: float, end_s: float) -> list[StepRow]:
    return [step for step in steps if step.end_s > start_s and step.start_s < end_s]


def _holds(steps: Sequence[StepRow]) -> list[tuple[int, int, float, float]]:
    """(request, instance, start, end) of every stretch of consecutive steps of one request on its instance."""
    holds: list[tuple[int, int, float, float]] = []
    last: dict[int, int] = {}
    for step in steps:
        place = last.get(step.instance)
        if len(step.request_ids) == 1 and place is not None:
            row, instance, start_s, end_s = holds[place]
            if row == step.request_ids[0] and end_s == step.start_s:
                holds[place] = (row, instance, start_s, step.end_s)
                continue
        last[step.instance] = len(holds)
        holds.append((step.request_ids[-1], step.instance, step.start_s, step.end_s))
    return holds


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
