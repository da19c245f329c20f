"""A plan from the champion's history: lengths, sigma, strata, guards and what an experiment will cost."""

from dataclasses import dataclass, replace

import numpy as np
from msgspec import structs

from kairos.scheduler_core.errors import InputError
from kairos.scheduler_core.experiment import Schedule
from kairos.scheduler_core.service.experiments.design import (
    RAMP_UP,
    Alpha,
    Design,
    Lengths,
    Limits,
    Pair,
    Plan,
    Stage,
    drain_p90_s,
    lengths_for,
    mock_of,
    pair_slots,
    sticky_lengths,
)
from kairos.scheduler_core.service.experiments.evidence import sigma_of
from kairos.scheduler_core.service.experiments.marks import group_names, guard_names, marks_of
from kairos.scheduler_core.service.experiments.observe import Ask, lead_s, pair_of, seen
from kairos.scheduler_core.service.experiments.outcomes import FAILED, Outcomes
from kairos.scheduler_core.service.experiments.sequence import covariate, differences, weights

FEWEST_HISTORY_PAIRS = 8
MOST_HISTORY_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Question:
    """What an operator wants to know, and what he knows better than the history."""

    design: Design
    champion: str
    challenger: str
    seed: int
    fixed_at: str
    decision_budget_us: float
    max_hours: float = 48.0
    margin_pp: float = 1.0
    effect_pp: float = 2.0
    challengers: int = 1
    """Among which the error budget is divided."""
    stages: tuple[Stage, ...] = RAMP_UP
    shared_queue: bool = False
    covariate_before_pair: bool = False
    drain_s: float | None = None
    sigma: float | None = None
    requests_per_pair: float | None = None
    load_bounds: tuple[float, float, float] | None = None


def plan_from(question: Question, history: Outcomes, ask: Ask | None) -> Plan:
    """The plan, without an id: it gets one when it starts.

    Args:
        history: the champion's requests.
        ask: None: the covariate is the offered load.

    Raises:
        InputError: the queue does not drain fast enough, or the history is too short.
    """
    if not len(history):
        raise InputError(
            f"there is no history of {question.champion}: no stored request has arrived_at_s; "
            "let it run with telemetry first"
        )
    lengths = _lengths(question, history)
    marks = marks_of(history)
    targets = history.ttft_target_s[np.isfinite(history.ttft_target_s)]
    plan = Plan(
        id="",
        design=question.design,
        champion=question.champion,
        challenger=question.challenger,
        lengths=lengths,
        sigma=1.0,
        requests_per_pair=1.0,
        load_bounds=(0.0, 0.0, 0.0),
        seed=question.seed,
        max_hours=question.max_hours,
        fixed_at=question.fixed_at,
        margin_pp=question.margin_pp,
        effect_pp=question.effect_pp,
        alpha=Alpha().shared_by(question.challengers),
        stages=question.stages,
        shared_queue=question.shared_queue,
        covariate="offered" if ask is None else "replay",
        covariate_before_pair=question.covariate_before_pair,
        marks=marks,
        limits=Limits(
            error_rate_p999=_error_rate_p999(history, lengths.block_s),
            decision_budget_us=question.decision_budget_us,
            ttft_target_s=float(targets.max()) if len(targets) else lengths.drain_p90_s,
            worst_wait_s=float(np.nan_to_num(history.wait_s).max()),
        ),
    )
    pairs = history_pairs(plan, history, ask)
    given = (question.sigma, question.requests_per_pair, question.load_bounds)
    if len(pairs) < FEWEST_HISTORY_PAIRS and None in given:
        raise InputError(
            f"not measurable yet: the history of {question.champion} holds {len(pairs)} whole pairs of blocks of "
            f"{lengths.block_s:.0f} s, {FEWEST_HISTORY_PAIRS} are needed; wait, or give sigma, requests_per_pair and "
            "load_bounds yourself"
        )
    return _fitted(plan, question, pairs)


def _lengths(question: Question, history: Outcomes) -> Lengths:
    targets = history.ttft_target_s[np.isfinite(history.ttft_target_s)]
    longest_s = float(targets.max()) if len(targets) else 0.0
    latency_s = float(np.quantile(history.finished_s - history.arrival_s, 0.999))
    drain_s = question.drain_s
    if drain_s is None:
        drain_s = drain_p90_s(history.arrival_s, history.finished_s, ~history.met)
    if question.design == "sticky":
        return sticky_lengths(drain_s, longest_s, latency_s)
    return lengths_for(drain_s, longest_s, latency_s)


def _error_rate_p999(history: Outcomes, block_s: float) -> float:
    """Of the share of failed requests in a block."""
    block = ((history.arrival_s - history.arrival_s[0]) // block_s).astype(np.int64)
    failed = np.bincount(block, history.status == FAILED)
    requests = np.bincount(block)
    return float(np.quantile(failed[requests > 0] / requests[requests > 0], 0.999))


def history_pairs(plan: Plan, history: Outcomes, ask: Ask | None) -> list[Pair]:
    """The newest pairs of blocks of the history, as if the champion had run against itself; oldest first."""
    mock = mock_of(plan)
    if plan.design == "pools" and (history.pool < 0).any():  # no pools yet: by turns
        history = replace(history, pool=np.arange(len(history)) % 2)
    begin_s, end_s = float(history.arrival_s[0]) + lead_s(plan), float(history.arrival_s[-1])
    whole = min(int((end_s - begin_s) // plan.pair_s), MOST_HISTORY_PAIRS)
    return [_history_pair(mock, i, end_s - (whole - i) * plan.pair_s, history, ask) for i in range(whole)]


def _history_pair(mock: Plan, i: int, start_s: float, history: Outcomes, ask: Ask | None) -> Pair:
    slots = pair_slots(mock, i, start_s, 0.5)
    low, high = np.searchsorted(history.arrival_s, (start_s - lead_s(mock), slots[-1].end_s))
    earlier = frozenset(history.session[:low].tolist())
    window = seen(mock, history.take(np.arange(low, high)), ask, known_sessions=earlier)
    return pair_of(mock, Schedule(mock.id, mock.seed, mock.champion, mock.challenger, 0, slots), slots, window)


def _fitted(plan: Plan, question: Question, pairs: list[Pair]) -> Plan:
    """The plan with what its history says about size and spread."""
    mock = mock_of(plan)
    counts = [pair.first.counted + pair.second.counted for pair in pairs]
    loads = [pair.load for pair in pairs]
    requests = question.requests_per_pair or max(float(np.median(counts)), 1.0)
    bounds = question.load_bounds or tuple(np.quantile(loads, (0.5, 0.75, 0.9)).tolist())
    fitted = structs.replace(plan, requests_per_pair=requests, load_bounds=bounds)
    mock = structs.replace(mock, requests_per_pair=requests)
    w = weights(mock, pairs)
    sigma = question.sigma or sigma_of(differences(mock, pairs, w), covariate(mock, pairs, w))

    def spread(names: list[str]) -> dict[str, float]:
        nothing = np.zeros(len(pairs))
        return {n: sigma_of(differences(mock, pairs, w, n), nothing) if pairs else sigma for n in names}

    return structs.replace(
        fitted, sigma=sigma, guards=spread(guard_names(plan.marks)), groups=spread(group_names(plan.marks))
    )
