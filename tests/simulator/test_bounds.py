"""No run of any policy, option, noise or seed exceeds the bound."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import fleet, workload

from kairos.adapters.simulator.bounds import end_to_end_bound, ttft_bound
from kairos.adapters.simulator.run import Knobs, simulate
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.plugins import installed
from kairos.scheduler_core.strategy import parse_strategy

RULES = [
    name + option
    for name, option in product(sorted(installed("prefill")), ("", "(lost_last=true)", "(lost_last=true,preempt=true)"))
    if not (name in ("on-time", "kairos-paper") and option)
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    placement=st.sampled_from(sorted(installed("prefill_placement"))),
    decode=st.sampled_from(sorted(installed("decode"))),
    requests=st.lists(
        st.tuples(st.floats(0.0, 8.0), st.integers(1, 6_000), st.integers(1, 6), st.floats(0.2, 6.0)),
        min_size=2,
        max_size=14,
    ),
    instances=st.integers(1, 3),
    together=st.integers(1, 3),
    knobs=st.builds(
        Knobs,
        seed=st.integers(0, 5),
        noise=st.sampled_from([0.0, 0.3]),
        predictor_error=st.sampled_from([0.0, 0.4]),
        deferred_share=st.sampled_from([0.0, 0.1]),
    ),
)
def test_no_run_exceeds_its_bound(
    rule: str,
    placement: str,
    decode: str,
    requests: list[tuple[float, int, int, float]],
    instances: int,
    together: int,
    knobs: Knobs,
) -> None:
    arrival_s, prompts, outputs, targets_s = zip(*sorted(requests), strict=True)
    submitted = workload(arrival_s, prompts, outputs, ttft_target_s=targets_s, tpot_target_s=0.03)
    at_work = fleet(instances, 1, chunk_tokens=2_000, max_requests_per_step=together, kv_tokens=20_000)

    run = simulate(submitted, at_work, parse_strategy(f"{rule}+{placement}+least-requests+{decode}"), knobs)

    assert not run.fallbacks
    assert int(np.sum(run.requests.ttft_met)) <= ttft_bound(submitted, at_work, knobs)
    if not knobs.noise:
        assert int(np.sum(run.requests.slo_met)) <= end_to_end_bound(submitted, at_work, knobs)


def test_there_is_no_end_to_end_bound_under_noise() -> None:
    with pytest.raises(ConfigError, match="noise 0"):
        end_to_end_bound(workload([0.0], [100]), fleet(), Knobs(noise=0.1))
