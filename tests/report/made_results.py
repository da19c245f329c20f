"""A results.json of the size and shape that `kairos compare` writes, made from a seed; its figures mean nothing."""

from typing import Any

import numpy as np

HOSTILE = [
    "<script>window.__pwn=1</script>",
    "</script><script>window.__pwn=2</script>",
    '"><img src=x onerror="window.__pwn=3">',
    "{{7*7}}",
    "javascript:window.__pwn=4",
    "\u202egnp.exe",
    "n" * 10_000,
]
TRACES = ["mooncake_conversation", "azure2023_code", "servegen_r1_resampled"]
TARGETS = ["fixed:2/tpot:0.05", "scaled:1,5/tpot:0.05", "classes:2,15/tpot:0.05"]
LOADS = [0.5, 0.7, 0.9, 1.1, 1.3]
STRATEGIES = {"engine-default": 0.55, "kairos": 1.6, "tuned": 1.56, "paper": 0.8, "sjf+late+headroom+slack(h=0.9)": 1.3}


def made_results(
    *,
    traces: list[str] | None = None,
    targets: list[str] | None = None,
    loads: list[float] | None = None,
    strategies: dict[str, float] | None = None,
    tenants: list[str] | None = None,
    stages: str = "all",
    seed: int = 0,
) -> dict[str, Any]:
    """Results for every combination; a strategy's number is the load at which half of its requests are late."""
    rng = np.random.default_rng(seed)
    traces, targets, loads = traces or TRACES, targets or TARGETS, loads or LOADS
    strategies = strategies or STRATEGIES
    names = list(strategies)
    cells, pairs, bounds = [], [], []
    for t, trace in enumerate(traces):
        for g, target in enumerate(targets):
            for load in loads:
                bound = float(0.995 - 0.02 * t - 0.05 * max(load - 0.6, 0) * (1 + 0.2 * g))
                bounds += [
                    {"trace": trace, "target": target, "load": load, "seed": s, "ttft_attainment": bound - 1e-4 * s}
                    for s in range(2)
                ]
                shares = {}
                for name, half in strategies.items():
                    half = half * (1 - 0.08 * t) + rng.normal(0, 0.03)
                    shares[name] = float(bound * 0.995 / (1 + np.exp(9 * (load - half))))
                    cells.append(_cell(rng, trace, target, load, name, shares[name], tenants or TENANTS, stages))
                for a in names:
                    for b in names:
                        if a != b and (b == names[0] or a == names[1]):
                            for metric in ["ttft_attainment"] + ["slo_attainment"] * (stages == "all"):
                                pairs.append(_pair(rng, trace, target, load, a, b, metric, shares[a] - shares[b]))
    return {
        "meta": {
            "version": "0.1.0",
            "command": f"kairos compare {' '.join(traces)} --loads {','.join(map(str, loads))} --seeds 2",
            "seeds": [0, 1],
            "config": {"fleet": {"prefill": [{"count": 4, "profile": "qwen3-32b-b300-tp4"}]}, "active": names[-1]},
            "baseline": names[0],
            "stages": stages,
            "synthetic": {traces[-1]: True},
            "notes": ["600 s of each trace and 2 seeds: intervals are wide."],
        },
        "cells": cells,
        "bounds": bounds,
        "pairs": pairs,
        "timelines": _timelines(rng, traces[0], targets[0], loads[len(loads) // 2], names[:2]),
    }


TENANTS = ["globex", "initech", "umbrella", "acme"]


def _number(rng: np.random.Generator, mean: float, half: float, n: int = 24) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _share(rng: np.random.Generator, mean: float) -> dict[str, float]:
    mean = float(np.clip(mean, 0.0, 1.0))
    half = float(0.004 + 0.09 * mean * (1 - mean) * rng.uniform(0.8, 1.2))
    return {"mean": mean, "low": max(mean - half, 0.0), "high": min(mean + half, 1.0), "n": 24}


def _group(rng: np.random.Generator, names: list[str], share: float, stages: str, slope: float) -> dict[str, Any]:
    group = {}
    for i, name in enumerate(names):
        mean = share + slope * (i - (len(names) - 1) / 2) * share * (1 - share) + rng.normal(0, 0.01)
        group[name] = {"ttft_attainment": _share(rng, mean)}
        if stages == "all":
            group[name]["slo_attainment"] = _share(rng, mean * 0.98)
    return group


def _cell(
    rng: np.random.Generator,
    trace: str,
    target: str,
    load: float,
    strategy: str,
    share: float,
    tenants: list[str],
    stages: str,
) -> dict[str, Any]:
    scale = 0.25 / max(share, 0.02)
    p = np.linspace(0, 1, 101)
    ttft = scale * np.exp(1.4 * np.sqrt(2) * _erfinv(2 * np.clip(p, 0.002, 0.998) - 1))
    finished = p <= 0.5 + 0.5 * min(1.0, share + 0.4)
    tpot = 0.02 / max(share, 0.2) * np.exp(0.35 * np.sqrt(2) * _erfinv(2 * np.clip(p, 0.002, 0.998) - 1))
    predicted = np.geomspace(0.02, 12, 14)
    slope = -1.5 if "sjf" in strategy or strategy == "kairos" else 0.6
    metrics: dict[str, Any] = {
        "ttft_attainment": _share(rng, share),
        "goodput_per_s": _number(rng, 6 * load * share, 0.2),
        "output_tokens_per_s": _number(rng, 1_800 * load, 40),
        "ttft_s": {q: _number(rng, float(np.quantile(ttft, v)), 0.01) for q, v in QUANTILES.items()},
        "worst_wait_s": _number(rng, float(ttft[-1] * 1.3), 1.0),
        "rejected": _number(rng, 0, 0),
        "unfinished": _number(rng, float(round(40 * (1 - share))), 1.0),
        "by_prompt_quartile": _group(rng, ["q1", "q2", "q3", "q4"], share, stages, slope),
        "by_class": _group(rng, ["interactive", "batch"], share, stages, 0.5),
        "by_tenant": _group(rng, tenants, share, stages, 0.3),
        "decision_us": {"p50": _number(rng, rng.uniform(8, 60), 1), "p99": _number(rng, rng.uniform(90, 600), 9)},
        "predictor": {
            "median_ape": _number(rng, rng.uniform(0.04, 0.08), 0.01),
            "p95_ape": _number(rng, rng.uniform(0.2, 0.3), 0.02),
        },
    }
    distributions = {"ttft_s": _quantiles(p, ttft, finished)}
    if stages == "all":
        metrics |= {
            "tpot_attainment": _share(rng, share * 0.5 + 0.49),
            "slo_attainment": _share(rng, share * 0.98),
            "tpot_s": {q: _number(rng, float(np.quantile(tpot, v)), 0.001) for q, v in QUANTILES.items()},
            "itl_s": {q: _number(rng, float(np.quantile(tpot, v)) * 1.5, 0.001) for q, v in QUANTILES.items()},
            "fluidity": _share(rng, share * 0.3 + 0.69),
        }
        distributions["tpot_s"] = _quantiles(p, tpot, p <= 1)
    return {
        "trace": trace,
        "target": target,
        "load": load,
        "strategy": strategy,
        "metrics": metrics,
        "distributions": distributions,
        "predicted_vs_actual": [
            {
                "predicted_s": float(s),
                "actual_s": float(s * np.exp(rng.normal(0.02, 0.06))),
                "n": int(rng.integers(9, 900)),
            }
            for s in predicted
        ],
        "sentence": f"{strategy} at load {load:g}: {100 * share:.1f} % of first tokens in time.",
    }


QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def _quantiles(p: Any, values: Any, known: Any) -> dict[str, Any]:
    return {
        "probabilities": [round(float(q), 4) for q in p],
        "values": [float(v) if k else None for v, k in zip(values, known, strict=True)],
    }


def _pair(
    rng: np.random.Generator, trace: str, target: str, load: float, a: str, b: str, metric: str, gain: float
) -> dict[str, Any]:
    mean, half = 100 * gain, float(rng.uniform(0.4, 2.5))
    verdict = "better" if mean > half else "worse" if mean < -half else "undecided"
    difference = {"mean": mean, "low": mean - half, "high": mean + half}
    place = {"trace": trace, "target": target, "load": load}
    return {**place, "a": a, "b": b, "metric": metric, "difference_pp": difference, "verdict": verdict}


def _timelines(
    rng: np.random.Generator, trace: str, target: str, load: float, strategies: list[str]
) -> list[dict[str, Any]]:
    """One instance by the first strategy in arrival order with whole prompts, by the second the shortest first."""
    tokens = [2_048, 123_192, *(int(n) for n in rng.lognormal(8.4, 0.9, 20))]
    arrivals = np.sort(rng.uniform(0.6, 6.0, len(tokens) - 2))
    requests = [
        (f"r-{1200 + i}", float(at), n) for i, (at, n) in enumerate(zip([0.2, 0.5, *arrivals], tokens, strict=True))
    ]
    timelines = []
    for strategy, shortest_first in zip(strategies, [False, True], strict=False):
        now, left, steps = 0.0, {r: n for r, _, n in requests}, []
        while any(left.values()):
            waiting = [(r, at) for r, at, _ in requests if left[r] and at <= now]
            if not waiting:
                now = min(at for r, at, _ in requests if left[r])
                continue
            r = min(waiting, key=lambda w: left[w[0]] if shortest_first else w[1])[0]
            new = min(left[r], 8_192)
            done = {q: n for q, _, n in requests}[r] - left[r]
            took = 0.0082 + 1.48e-5 * new + 3.9e-10 * new * (done + new / 2)
            steps.append({"start_s": 100 + now, "end_s": 100 + now + took, "request_ids": [r], "new_tokens": new})
            now, left[r] = now + took, left[r] - new
        rows = []
        for r, at, n in requests:
            mine = [s for s in steps if r in s["request_ids"]]
            first = float(mine[-1]["end_s"])
            row = {"request_id": r, "arrival_s": 100 + at, "deadline_s": 102 + at, "start_s": mine[0]["start_s"]}
            rows.append({**row, "first_token_s": first, "prompt_tokens": n, "ttft_met": first <= 102 + at})
        timelines.append(
            {
                "trace": trace,
                "target": target,
                "load": load,
                "seed": 0,
                "strategy": strategy,
                "instance": "prefill-0",
                "rule": f"the 10 s in which one request of {strategies[0]} made most others late",
                "start_s": 100.0,
                "end_s": 110.0,
                "blocker": "r-1201",
                "steps": steps,
                "requests": rows,
            }
        )
    return timelines


def _erfinv(x: Any) -> Any:
    """Winitzki's approximation; good to 2e-3, which is enough for figures that mean nothing."""
    log = np.log1p(-(x**2))
    half = 2 / (np.pi * 0.147) + log / 2
    return np.sign(x) * np.sqrt(np.sqrt(half**2 - log / 0.147) - half)
