"""No policy can know how long an output will be."""

import inspect
from itertools import cycle

import msgspec
import numpy as np
import pytest
from builders import step_times
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import fleet, workload

from kairos.adapters.simulator.run import Knobs, Run, StepRow, simulate
from kairos.scheduler_core import domain, policy
from kairos.scheduler_core.plugins import installed
from kairos.scheduler_core.strategy import parse_strategy

EMITTED_SO_FAR = {"Resident.output_tokens"}
"""What a client has seen, too."""

OF_THE_PAST = (policy.PrefillStep, policy.DecodeStep)
"""Steps that have ended: they may say which outputs ended with them."""


def test_no_view_has_a_field_for_the_length_of_the_output() -> None:
    structs = [
        found
        for module in (domain, policy)
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, msgspec.Struct) and found not in OF_THE_PAST
    ]

    fields = {f"{struct.__name__}.{field}" for struct in structs for field in struct.__struct_fields__}

    assert {"Waiting.prompt_tokens", "DecodeView.residents", "AdmissionView.request"} <= fields
    assert {name for name in fields if "output" in name or "max_tokens" in name} == EMITTED_SO_FAR


# Every policy of each of these kinds takes part in one of these.
STRATEGIES = [
    "+".join(names)
    for names in zip(
        sorted(installed("prefill")),
        cycle(sorted(installed("prefill_placement"))),
        cycle(sorted(installed("decode_placement"))),
        cycle(sorted(installed("decode"))),
        strict=False,
    )
]


def run_of(strategy: str, outputs: list[int]) -> Run:
    n = len(outputs)
    random = np.random.default_rng(n)
    requests = workload(
        np.sort(random.uniform(0, n / 20, n)).round(3).tolist(),
        random.integers(10, 9_000, n).tolist(),
        outputs,
        random.choice([0.5, 2.0, 8.0], n).tolist(),
        random.choice([0.02, 0.05, 0.1], n).tolist(),
    )
    instances = fleet(
        prefill=2,
        decode=2,
        times=step_times(prefill=(0.01, 2e-5, 4e-10), decode=(0.01, 1e-3, 1e-7)),
        chunk_tokens=2_048,
        max_requests_per_step=4,
        kv_tokens=30_000,
    )
    return simulate(requests, instances, parse_strategy(strategy), Knobs(keep_steps=True))


def steps_before(run: Run, end_s: float) -> list[StepRow]:
    return sorted((step for step in run.steps if step.start_s < end_s), key=lambda s: (s.start_s, s.kind, s.instance))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None, max_examples=8)
@given(
    outputs=st.lists(st.integers(1, 40), min_size=5, max_size=40),
    longer=st.lists(st.tuples(st.integers(0, 39), st.integers(1, 60)), min_size=1, max_size=5),
)
def test_decisions_are_the_same_until_an_output_ends_that_is_longer_in_the_other_future(
    strategy: str, outputs: list[int], longer: list[tuple[int, int]]
) -> None:
    other = list(outputs)
    for place, more in longer:
        other[place % len(other)] += more
    one, two = run_of(strategy, outputs), run_of(strategy, other)

    changed = [n for n in range(len(outputs)) if outputs[n] != other[n]]
    first_end_s = float(min(one.requests.last_token_s[n] for n in changed))

    assert steps_before(one, first_end_s) == steps_before(two, first_end_s)
    assert np.isfinite(first_end_s)
    assert len(one.steps) != len(two.steps) or one.steps != two.steps  # and from then on they differ
