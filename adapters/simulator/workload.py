"""From a trace to what is submitted: jitter, targets, scaling in time (docs/simulator.md)."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from kairos.adapters.simulator.tables import IntArray, Workload
from kairos.adapters.traces import Trace
from kairos.scheduler_core.config import SloSettings
from kairos.scheduler_core.domain import Line, RequestId, StepTimes
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.slo import NO_TARGET_S, FloatArray


@dataclass(frozen=True, slots=True)
class Target:
    """Targets that replace those of the configuration.

    `fixed:8`, `scaled:1,5` = max(1 s, 5 x isolated prefill), `classes:2,15` = one each by a hash of the id; each
    optionally with `/tpot:0.025,0.05` in equal shares.
    """

    text: str
    family: str
    ttft: tuple[float, ...]
    tpot_s: tuple[float, ...]


def parse_target(text: str) -> Target:
    """Read a `--target`.

    >>> parse_target("scaled:1,5/tpot:0.05").ttft
    (1.0, 5.0)

    Raises:
        ConfigError: it is none of the forms above.
    """
    match = re.fullmatch(r"(fixed|scaled|classes):([^/]+)(?:/tpot:([^/]+))?", text.strip())
    if match is None:
        raise ConfigError(f"cannot read target '{text}'; write fixed:8, scaled:1,5 or classes:2,15, with /tpot:0.05")
    family, first, second = match.groups()
    ttft, tpot_s = _seconds(first, text), _seconds(second, text) if second else ()
    wanted = {"fixed": len(ttft) == 1, "scaled": len(ttft) == 2, "classes": True}[family]
    if not wanted:
        raise ConfigError(f"target '{text}': {family} takes {'one number' if family == 'fixed' else 'two numbers'}")
    return Target(text, family, ttft, tpot_s)


def _seconds(text: str, target: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (float("nan"),)
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ConfigError(f"target '{target}': '{text}' must be numbers above 0, separated by commas")
    return values


def isolated_prefill_s(times: StepTimes, prompt_tokens: IntArray) -> FloatArray:
    """Seconds of each prompt as one unchunked step alone, nothing cached (n,): rule 9."""
    distinct, places = np.unique(prompt_tokens, return_inverse=True)
    seconds = np.array([times.remaining_prefill_s(int(n), 0, None) for n in distinct])
    return seconds[places]


def build_workload(
    trace: Trace,
    slo: SloSettings,
    first_profile: StepTimes,
    target: Target | None = None,
    jitter_s: float = 0.0,
    jitter_seed: int = 0,
    limit_s: float | None = None,
) -> Workload:
    """The requests of a trace, in (arrival, file) order, with the targets of the configuration or of `target`.

    Args:
        trace: what was recorded.
        slo: classes of the configuration; a request of no known class has the class `default`.
        first_profile: step times of the first prefill group, for scaled targets.
        target: replaces the configuration's targets.
        jitter_s: adds `default_rng(jitter_seed).uniform(0, jitter_s, n)` to the arrivals in file order.
        jitter_seed: see there.
        limit_s: keep only arrivals within so many seconds of the first.
    """
    arrival_s = trace.arrival_s
    if jitter_s:
        arrival_s = arrival_s + np.random.default_rng(jitter_seed).uniform(0.0, jitter_s, len(arrival_s))
    order = np.argsort(arrival_s, kind="stable")
    if limit_s is not None:
        order = order[arrival_s[order] < arrival_s[order[0]] + limit_s]
    n = len(order)
    prompt_tokens, output_tokens = trace.prompt_tokens[order], trace.output_tokens[order]
    ids: list[RequestId] = list(range(n)) if trace.request_id is None else [trace.request_id[i] for i in order]
    ttft_s, tpot_s, classes = (
        _configured(slo, _column(trace.slo_class, order, "default"))
        if target is None
        else _assigned(target, ids, isolated_prefill_s(first_profile, prompt_tokens))
    )
    return Workload(
        trace=trace.name,
        request_id=ids,
        arrival_s=arrival_s[order],
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        ttft_target_s=ttft_s,
        tpot_target_s=tpot_s,
        slo_class=classes,
        tenant=_column(trace.tenant, order, ""),
        model=_column(trace.model, order, ""),
        block_ids=None if trace.block_ids is None else [trace.block_ids[i] for i in order],
        block_tokens=trace.block_tokens,
        notes=() if target is not None else _unknown_classes(slo, _column(trace.slo_class, order, "default")),
    )


def _column(values: Sequence[str] | None, order: IntArray, missing: str) -> list[str]:
    return [missing] * len(order) if values is None else [values[i] or missing for i in order]


def _configured(slo: SloSettings, classes: list[str]) -> tuple[FloatArray, FloatArray, list[str]]:
    known = slo.classes
    names = [name if name in known else "default" for name in classes]
    if unknown := set(names) - set(known):
        raise ConfigError(f"slo.classes has no class '{sorted(unknown)[0]}'; add it, or give --target")
    ttft = np.array([known[name].ttft_s or NO_TARGET_S for name in names], dtype=np.float64)
    tpot = np.array([known[name].tpot_s or NO_TARGET_S for name in names], dtype=np.float64)
    return ttft, tpot, names


def _unknown_classes(slo: SloSettings, classes: list[str]) -> list[str]:
    return [
        f"{count} requests of class '{name}', which slo.classes does not have, count as 'default'"
        for name, count in sorted(Counter(classes).items())
        if name not in slo.classes
    ]


def _assigned(
    target: Target, ids: Sequence[RequestId], isolated_s: FloatArray
) -> tuple[FloatArray, FloatArray, list[str]]:
    n = len(ids)
    labels = [""] * n
    if target.family == "scaled":
        ttft = np.maximum(target.ttft[0], target.ttft[1] * isolated_s)
    else:
        places = _shares(ids, b"", len(target.ttft))
        ttft = np.array(target.ttft)[places]
        if len(target.ttft) > 1:
            labels = [f"ttft-{target.ttft[place]:g}" for place in places]
    if not target.tpot_s:
        return ttft, np.full(n, NO_TARGET_S), [label or "default" for label in labels]
    places = _shares(ids, b"tpot", len(target.tpot_s))
    if len(target.tpot_s) > 1:
        labels = [f"{a} tpot-{target.tpot_s[place]:g}".strip() for a, place in zip(labels, places, strict=True)]
    return ttft, np.array(target.tpot_s)[places], [label or "default" for label in labels]


def _shares(ids: Sequence[RequestId], salt: bytes, k: int) -> IntArray:
    return np.array([crc32(salt + str(request_id).encode()) % k for request_id in ids], dtype=np.int64)


def scale_time(workload: Workload, factor: float) -> Workload:
    """The same workload with all arrival times multiplied."""
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"time scale is {factor}; use a number above 0")
    return replace(workload, arrival_s=workload.arrival_s * factor)


def first_requests(workload: Workload, count: int) -> Workload:
    """The first so many requests, the first of them at second 0."""
    return Workload(
        trace=workload.trace,
        request_id=workload.request_id[:count],
        arrival_s=workload.arrival_s[:count] - workload.arrival_s[:1],
        prompt_tokens=workload.prompt_tokens[:count],
        output_tokens=workload.output_tokens[:count],
        ttft_target_s=workload.ttft_target_s[:count],
        tpot_target_s=workload.tpot_target_s[:count],
        slo_class=workload.slo_class[:count],
        tenant=workload.tenant[:count],
        model=workload.model[:count],
        block_ids=None if workload.block_ids is None else workload.block_ids[:count],
        block_tokens=workload.block_tokens,
        notes=workload.notes,
    )


def offered_load(workload: Workload, first_profile: StepTimes, instances: int) -> float:
    """Prefill seconds of work per second and instance; inf when all arrive at once."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    work_s = float(isolated_prefill_s(first_profile, workload.prompt_tokens).sum())
    return work_s / (span_s * instances) if span_s > 0 else math.inf


def at_load(workload: Workload, load: float, first_profile: StepTimes, instances: int) -> Workload:
    """The workload with time scaled so that the offered prefill work is `load` per instance and second."""
    if not (math.isfinite(load) and load > 0):
        raise ConfigError(f"load is {load}; use a number above 0")
    offered = offered_load(workload, first_profile, instances)
    return workload if math.isinf(offered) else scale_time(workload, offered / load)


def at_decode_load(workload: Workload, load: float, lines: Sequence[Line]) -> Workload:
    """The workload with time scaled to `load` of the SLO capacity of the decode instances.

    At capacity the residents of an instance use, in the mean, all of the rate their targets leave:
    sum e_r/tau_r = 1 - a/tau_min with e_r = b + c*context, under `continuous` without a KV limit (docs/simulator.md).
    In steady state a step takes T = a/(1 - W) where W is marginal decode work per second, and the sum is V*T with V
    the work over its target per second; both grow with the load, which gives the capacity in closed form.

    Raises:
        ConfigError: the load is no number above 0, or the tightest target is at most the fixed step cost: nothing can
            meet it.
    """
    if not (math.isfinite(load) and load > 0):
        raise ConfigError(f"decode load is {load}; use a number above 0")
    a_s, b_s, c_s = (float(np.mean([line[i] for line in lines])) for i in range(3))
    tightest_s = float(workload.tpot_target_s.min())
    if tightest_s <= a_s:
        raise ConfigError(f"the tightest TPOT target is {tightest_s:g} s, the fixed cost of a decode step {a_s:g} s")
    later = workload.output_tokens - 1.0
    context = later * (workload.prompt_tokens + 1) + later * (later - 1) / 2
    work_s = b_s * later + c_s * context
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0]) * len(lines)
    share = 1.0 if math.isinf(tightest_s) else 1 - a_s / tightest_s
    needed_s = a_s * float(np.sum(work_s / workload.tpot_target_s)) + share * float(work_s.sum())
    if span_s <= 0 or needed_s <= 0:
        return workload
    return scale_time(workload, needed_s / (share * span_s * load))
