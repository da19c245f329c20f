"""A paired comparison: the same arrivals and noise under several strategies, with a bound beside them.

Runs are independent and go through joblib, so over all cores of this machine or, with a registered backend of Ray or
Dask, of a cluster. Each finished run is kept in `runs/` of the output folder: an interrupted comparison goes on where
it stopped.
"""

import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import msgspec
import numpy as np

import kairos
from kairos.adapters.simulator import evidence, windows
from kairos.adapters.simulator.bounds import ttft_bound
from kairos.adapters.simulator.evidence import Gaps
from kairos.adapters.simulator.fleet import SimulatedFleet
from kairos.adapters.simulator.intervals import TimeBlocks
from kairos.adapters.simulator.run import Knobs, StepRow, simulate
from kairos.adapters.simulator.scenario import (
    Scenario,
    fleet_of,
    notes_of,
    settings_of,
    strategy_of,
    synthetic,
    workload_of,
)
from kairos.adapters.simulator.tables import RequestTable
from kairos.scheduler_core.config import Settings, StepTimesSettings
from kairos.scheduler_core.slo import FloatArray, attainment

if TYPE_CHECKING:
    from kairos.adapters.loadgen import LiveRun

_GAPS_KEPT = 200_000
"""Gaps between tokens that are kept of a run, evenly spread, the longest included."""
_BINS = 12
_METRICS: tuple[evidence.Metric, ...] = ("slo_attainment", "ttft_attainment", "tpot_attainment")
_PROBABILITIES = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare: every strategy in every scenario with every seed."""

    scenarios: Sequence[Scenario]
    strategies: Sequence[str]
    seeds: Sequence[int]
    knobs: Knobs

    def seeded(self, seed: int) -> Knobs:
        """The knobs of a seed; without noise and errors all seeds are the same run."""
        return replace(self.knobs, seed=seed if self.knobs.noise or self.knobs.predictor_error else 0)

    def runs(self) -> list[tuple[Scenario, str, Knobs]]:
        """Every run that is needed, once."""
        wanted = product(self.scenarios, self.strategies, map(self.seeded, self.seeds))
        return list(dict.fromkeys(wanted))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a comparison needs of one run."""

    table: RequestTable
    prefill_steps: Sequence[StepRow]
    decision_us: FloatArray
    gaps: Gaps
    fallbacks: Mapping[str, int]
    notes: Sequence[str]


def compare(plan: Plan, out: Path, command: str, jobs: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """Run what is missing, then write and return results.json.

    Args:
        plan: what to compare.
        out: folder of the results, made if need be.
        command: how it was called, for the record.
        jobs: processes; -1 = one a core.
        progress: told how many runs have ended.

    Raises:
        InputError: a trace, fleet or strategy that cannot be used; before any run begins.
    """
    for scenario in plan.scenarios:
        workload_of(scenario)
        for text in plan.strategies:
            strategy_of(settings_of(scenario.fleet), text)
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [joblib.delayed(_run)(*run, folder) for run in plan.runs()]
    ended = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)
    for count, _ in enumerate(ended, start=1):
        progress(count)
    results = _results(plan, folder, command)
    (out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    return results


# -- one run


def _file_of(scenario: Scenario, strategy: str, knobs: Knobs, folder: Path) -> Path:
    """The file of a run; its name holds everything that the run depends on."""
    settings = settings_of(scenario.fleet)
    what = {
        "kairos": kairos.__version__,
        "scenario": {key: str(value) for key, value in asdict(scenario).items()},
        "trace": _digest(scenario.trace),
        "settings": settings.model_dump(mode="json"),
        "models": {name: _digest(Path(times.model)) for name, times in _step_times(settings) if times.model},
        "strategy": strategy_of(settings, strategy).text,
        "policies": [_digest(Path(file)) for file in strategy_of(settings, strategy).sources()],
        "knobs": asdict(knobs),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:24]}.run"


def _step_times(settings: Settings) -> Iterator[tuple[str, StepTimesSettings]]:
    for name, profile in settings.profiles.items():
        if profile.step_times is not None:
            yield name, profile.step_times


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(scenario: Scenario, strategy: str, knobs: Knobs, folder: Path) -> None:
    path = _file_of(scenario, strategy, knobs, folder)
    if _load(path) is not None:
        return
    chosen = strategy_of(settings_of(scenario.fleet), strategy)
    run = simulate(workload_of(scenario), fleet_of(scenario.fleet), chosen, knobs)
    columns = {f.name: getattr(run.requests, f.name) for f in fields(RequestTable) if f.name != "workload"}
    steps = [step for step in run.steps if step.kind == "prefill"]
    _save((columns, steps, run.decision_us, _thinned(run.gaps), dict(run.fallbacks), list(run.notes)), path)


def _save(kept: tuple[Any, ...], path: Path) -> None:
    """Write what a run left, with its digest before it, whole or not at all."""
    body = zlib.compress(pickle.dumps(kept, pickle.HIGHEST_PROTOCOL), 3)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(hashlib.sha256(body).digest() + body)
    unfinished.replace(path)


def _load(path: Path) -> tuple[Any, ...] | None:
    """What a run left; None: nothing, or a damaged file."""
    content = path.read_bytes() if path.exists() else b""
    digest, body = content[:32], content[32:]
    if hashlib.sha256(body).digest() != digest:
        return None
    kept: tuple[Any, ...] = pickle.loads(zlib.decompress(body))
    return kept


def _thinned(gaps: Gaps) -> Gaps:
    n = len(gaps.itl_s)
    if n <= _GAPS_KEPT:
        return gaps
    kept = np.unique(np.append(np.linspace(0, n - 1, _GAPS_KEPT).astype(np.int64), np.argmax(gaps.itl_s)))
    return Gaps(gaps.request[kept], gaps.itl_s[kept])


def _kept(scenario: Scenario, strategy: str, knobs: Knobs, folder: Path) -> Kept:
    kept = _load(_file_of(scenario, strategy, knobs, folder))
    assert kept is not None, "a run that just ended"
    columns, steps, decision_us, gaps, fallbacks, notes = kept
    return Kept(RequestTable(workload=workload_of(scenario), **columns), steps, decision_us, gaps, fallbacks, notes)


# -- results.json


def add_live_runs(
    results: dict[str, Any], place: Mapping[str, Any], runs: Mapping[str, "LiveRun"], fleet: SimulatedFleet
) -> None:
    """Add to results.json what became of the same requests under several strategies on a live fleet.

    Args:
        results: as `compare` made it.
        place: trace, target and load, as of a cell.
        runs: by strategy.
        fleet: what the live one is, for the bound.
    """
    tables = {strategy: run.requests for strategy, run in runs.items()}
    blocks = evidence.time_blocks([next(iter(tables.values()))])
    cells = [
        {
            **place,
            "strategy": strategy,
            "metrics": evidence.cell_metrics([run.requests], blocks, [run.decision_us], [run.gaps]),
            "distributions": _distributions([run.requests]),
            "predicted_vs_actual": [],
        }
        for strategy, run in runs.items()
    ]
    pairs = list(_pairs(place, {strategy: [table] for strategy, table in tables.items()}, blocks, _METRICS))
    workload = next(iter(tables.values())).workload
    bound = ttft_bound(workload, fleet, Knobs()) / len(workload)
    added = {"cells": cells, "pairs": pairs, "bounds": [{**place, "seed": 0, "ttft_attainment": bound}]}
    for name, rows in msgspec.json.decode(msgspec.json.encode(added)).items():
        results[name].extend(rows)
    meta = results["meta"]
    meta["sentences"].extend(map(evidence.sentence, pairs))
    meta["expected_false"] += evidence.expected_false(pairs)


def _pairs(
    place: Mapping[str, Any],
    tables: Mapping[str, Sequence[RequestTable]],
    blocks: TimeBlocks,
    metrics: Sequence[evidence.Metric],
) -> Iterator[evidence.Pair]:
    """Every two strategies of a place, in every metric."""
    for b, a in combinations(tables, 2):
        for metric in metrics:
            found = evidence.pair_verdict(tables[a], tables[b], blocks, metric)
            yield evidence.Pair(
                a=a, b=b, metric=metric, difference_pp=found.difference_pp, verdict=found.verdict, **place
            )


def _results(plan: Plan, folder: Path, command: str) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    pairs: list[evidence.Pair] = []
    timelines: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    prefill_only = plan.knobs.stages == "prefill"
    metrics = ("ttft_attainment",) if prefill_only else _METRICS
    for scenario in plan.scenarios:
        notes.update(dict.fromkeys(notes_of(scenario.trace)))
        place: dict[str, Any] = {
            "trace": workload_of(scenario).trace,
            "target": scenario.target or "configured",
            "load": scenario.level,
        }
        runs = {
            text: [_kept(scenario, text, plan.seeded(seed), folder) for seed in plan.seeds] for text in plan.strategies
        }
        tables = {text: [run.table for run in kept] for text, kept in runs.items()}
        blocks = evidence.time_blocks(tables[plan.strategies[0]])
        for text, kept in runs.items():
            figures = evidence.cell_metrics(
                tables[text],
                blocks,
                [run.decision_us for run in kept],
                None if prefill_only else [r.gaps for r in kept],
            )
            cells.append(
                {
                    **place,
                    "strategy": text,
                    "metrics": figures,
                    "distributions": _distributions(tables[text]),
                    "predicted_vs_actual": _predicted_actual(tables[text]),
                }
            )
            notes.update(dict.fromkeys(note for run in kept for note in run.notes))
            notes.update(dict.fromkeys(_fallback_notes(text, kept)))
        pairs.extend(_pairs(place, tables, blocks, metrics))
        bounds.extend({**place, "seed": seed, "ttft_attainment": _bound(scenario, plan, seed)} for seed in plan.seeds)
        timelines.extend(_timelines(place, plan, {text: kept[0] for text, kept in runs.items()}))
    meta = {
        "version": kairos.__version__,
        "command": command,
        "seeds": list(plan.seeds),
        "config": {s.fleet: settings_of(s.fleet).model_dump(mode="json") for s in plan.scenarios},
        "baseline": plan.strategies[0],
        "strategies": {text: strategy_of(settings_of(plan.scenarios[0].fleet), text).text for text in plan.strategies},
        "stages": plan.knobs.stages,
        "knobs": asdict(plan.knobs),
        "synthetic": {workload_of(s).trace: synthetic(s.trace) for s in plan.scenarios},
        "notes": list(notes),
        "expected_false": evidence.expected_false(pairs),
        "sentences": [evidence.sentence(pair) for pair in pairs],
    }
    results = {"meta": meta, "cells": cells, "bounds": bounds, "pairs": pairs, "timelines": timelines}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(results))
    return plain


def _fallback_notes(strategy: str, kept: Sequence[Kept]) -> Iterator[str]:
    for run in kept:
        for what, count in run.fallbacks.items():
            yield f"{strategy}: {count} decisions by arrival order, since {what}"


def _bound(scenario: Scenario, plan: Plan, seed: int) -> float:
    workload = workload_of(scenario)
    return ttft_bound(workload, fleet_of(scenario.fleet), plan.seeded(seed)) / len(workload)


def _distributions(tables: Sequence[RequestTable]) -> dict[str, Any]:
    """Quantile functions over all submitted requests; a request that never had the value counts as the largest."""
    found = {}
    for name in ("ttft_s", "tpot_s"):
        values = np.concatenate([getattr(table, name) for table in tables])
        if name == "tpot_s":
            values = values[np.concatenate([table.workload.output_tokens > 1 for table in tables])]
        if not np.isfinite(values).any():
            continue
        ordered = np.sort(np.where(np.isnan(values), np.inf, values))
        at = np.minimum((_PROBABILITIES * len(ordered)).astype(np.int64), len(ordered) - 1)
        found[name] = {
            "probabilities": _PROBABILITIES.round(2).tolist(),
            "values": [value if np.isfinite(value) else None for value in ordered[at].tolist()],
        }
    return found


def _predicted_actual(tables: Sequence[RequestTable]) -> list[dict[str, float]]:
    """Medians of predicted and actual isolated prefill seconds in bins of equally many requests."""
    predicted = np.concatenate([table.predicted_prefill_s for table in tables])
    actual = np.concatenate([table.actual_prefill_s for table in tables])
    known = np.flatnonzero(np.isfinite(predicted) & np.isfinite(actual))
    bins = np.array_split(known[np.argsort(predicted[known])], _BINS)
    return [
        {"predicted_s": float(np.median(predicted[b])), "actual_s": float(np.median(actual[b])), "n": len(b)}
        for b in bins
        if len(b)
    ]


def _timelines(place: Mapping[str, Any], plan: Plan, first: Mapping[str, Kept]) -> list[dict[str, Any]]:
    """The worst head-of-line window of the baseline, under it and under the strategy with the best attainment."""
    baseline = plan.strategies[0]
    window = windows.worst_blocking(first[baseline].table, first[baseline].prefill_steps)
    if window is None:
        return []
    best = max(plan.strategies, key=lambda text: attainment(first[text].table.ttft_met))
    return [
        {
            **place,
            "seed": plan.seeds[0],
            "strategy": text,
            **windows.timeline(first[text].table, first[text].prefill_steps, window),
        }
        for text in dict.fromkeys((baseline, best))
    ]
