"""The clairvoyant bounds of a scenario: what `clairvoyant` needs to know, worked out from workload, fleet and noise."""

from collections.abc import Callable

import numpy as np

from kairos.adapters.simulator import clairvoyant
from kairos.adapters.simulator.fleet import PrefillUnit, SimulatedFleet
from kairos.adapters.simulator.noise import request_factors
from kairos.adapters.simulator.run import Knobs
from kairos.adapters.simulator.tables import IntArray, Workload
from kairos.scheduler_core.domain import LinearStepTimes
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.slo import FloatArray


def ttft_bound(workload: Workload, fleet: SimulatedFleet, knobs: Knobs) -> int:
    """The most requests that any scheduler could serve within their TTFT target."""
    work_s, alone_s = _prefill_needs(workload, fleet, knobs)
    possible = alone_s <= workload.ttft_target_s
    return clairvoyant.ttft_bound(
        workload.arrival_s[possible],
        work_s[possible],
        (workload.arrival_s + workload.ttft_target_s)[possible],
        len(fleet.prefill),
    )


def end_to_end_bound(workload: Workload, fleet: SimulatedFleet, knobs: Knobs) -> int:
    """The most requests that any scheduler could serve within both targets.

    Raises:
        ConfigError: decode noise has no lower limit, step times are learned, or decode instances differ: there is no
            such bound then.
    """
    unit = fleet.decode[0]
    times = unit.instance.step_times
    alike = all((u.instance.step_times, u.instance.kv_tokens) == (times, unit.instance.kv_tokens) for u in fleet.decode)
    if knobs.noise or not isinstance(times, LinearStepTimes) or not alike:
        raise ConfigError(
            "an end-to-end bound needs noise 0 and decode instances that are alike, with linear step times"
        )
    work_s, alone_s = _prefill_needs(workload, fleet, knobs)
    link = fleet.kv_transfer
    by_prefill = fleet.handover.first_token == "prefill"
    kv_bytes = workload.prompt_tokens.astype(np.float64) * link.bytes_per_token
    transfer_s = link.latency_s + kv_bytes / link.bytes_per_s
    capacity = clairvoyant.DecodeCapacity(
        line=times.decode_line,
        instances=len(fleet.decode),
        kv_tokens=unit.instance.kv_tokens,
        batch_limit=max(u.instance.batch_limit for u in fleet.decode),
        transfer_s=transfer_s * (1.0 if by_prefill else 0.0),
    )
    return clairvoyant.end_to_end_bound(workload, work_s, alone_s, len(fleet.prefill), capacity)


def _prefill_needs(workload: Workload, fleet: SimulatedFleet, knobs: Knobs) -> tuple[FloatArray, FloatArray]:
    """Lower bounds on the prefill seconds that each request takes from the fleet, and on its TTFT alone; (n,) each."""
    noise = np.array(request_factors(knobs.seed, "prefill noise", knobs.noise, len(workload)))
    cached: IntArray = np.zeros(len(workload), dtype=np.int64)
    if any(unit.cache_tokens for unit in fleet.prefill):
        cached = np.minimum(clairvoyant.shareable_tokens(workload), workload.prompt_tokens - 1)
    work_s = np.full(len(workload), np.inf)
    alone_s = np.full(len(workload), np.inf)
    seen: set[object] = set()
    for unit in fleet.prefill:
        instance = unit.instance
        kind = (id(instance.step_times), instance.chunk_tokens, instance.max_requests_per_step)
        if kind in seen:
            continue
        seen.add(kind)
        if instance.max_requests_per_step == 1:
            unit_alone_s = unit_work_s = noise * _alone_s(unit, workload.prompt_tokens, cached)
        else:  # the fixed cost may be another request's, with that one's noise
            line = instance.step_times.prefill_line
            unit_work_s = clairvoyant.lower_bound_work_s(
                line, workload.prompt_tokens, cached, noise, pays_fixed_cost=False
            )
            unit_alone_s = unit_work_s + line.a_s * float(noise.min(initial=np.inf))
        work_s, alone_s = np.minimum(work_s, unit_work_s), np.minimum(alone_s, unit_alone_s)
    return work_s, alone_s


def _alone_s(unit: PrefillUnit, prompt_tokens: IntArray, cached_tokens: IntArray) -> FloatArray:
    """Seconds of each prompt alone, in chunks or whole: learned times need not be subadditive, so the shorter."""
    instance = unit.instance
    remaining: Callable[[int, int, int | None], float] = instance.step_times.remaining_prefill_s
    pairs, places = np.unique(np.stack([prompt_tokens - cached_tokens, cached_tokens]), axis=1, return_inverse=True)
    seconds = np.array(
        [
            min(remaining(new, context, None), remaining(new, context, instance.chunk_tokens))
            for new, context in pairs.T.tolist()
        ]
    )
    return seconds[places.ravel()]
