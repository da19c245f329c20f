"""The bound: exact where it can be checked, never below what a schedule reaches, and moved only the right way."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import ArrayLike
from simulator.cases import CASES, Case
from simulator.reference import simulate

from kairos.adapters.simulator.clairvoyant import (
    DecodeCapacity,
    Demand,
    end_to_end_bound,
    lower_bound_work_s,
    lp_bound,
    shareable_tokens,
    ttft_bound,
)
from kairos.adapters.simulator.tables import Workload
from kairos.scheduler_core.domain import Line
from kairos.scheduler_core.slo import FloatArray

HORIZON_S = 64
TARGETS = ("fixed", "classes", "any")


def requests(seed: int, targets: str, n: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Arrivals, work and deadlines in whole seconds, so that a grid of whole seconds rounds nothing."""
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.integers(0, HORIZON_S - 16, n)).astype(float)
    work_s = rng.integers(1, 7, n).astype(float)
    target_s = {
        "fixed": np.full(n, 6.0),
        "classes": rng.choice([6.0, 15.0], n),
        "any": rng.integers(1, 16, n).astype(float),
    }[targets]
    possible = work_s <= target_s
    return arrival_s[possible], work_s[possible], (arrival_s + target_s)[possible]


def on_seconds(arrival_s: FloatArray, work_s: FloatArray, deadline_s: FloatArray, instances: int) -> int:
    """The linear program on a grid of whole seconds."""
    ends = Demand(
        np.append(arrival_s, 0.0), np.append(deadline_s, HORIZON_S), np.append(work_s, 1e-9), instances, HORIZON_S
    )  # one more request, of no work, stretches the grid to the horizon
    return lp_bound([ends]) - 1


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("instances", [1, 2])
def test_the_greedy_equals_the_linear_program_where_the_grid_rounds_nothing(targets: str, instances: int) -> None:
    for seed in range(40):
        some = requests(seed, targets, n=10 + seed)

        assert ttft_bound(*some, instances) == on_seconds(*some, instances), seed


def test_a_finer_grid_only_tightens_the_linear_program_down_to_the_greedy() -> None:
    rng = np.random.default_rng(4)
    arrival_s = np.sort(rng.uniform(0, 300, 1000))
    work_s = rng.lognormal(-1.5, 0.9, 1000)
    deadline_s = arrival_s + np.maximum(1.0, 5 * work_s)
    exact = ttft_bound(arrival_s, work_s, deadline_s, 1)

    bounds = [lp_bound([Demand(arrival_s, deadline_s, work_s, 1, slots)]) for slots in (256, 1024, 4096, 16384)]

    assert all(coarse >= fine for coarse, fine in pairwise(bounds))
    assert exact <= bounds[-1] <= 1.005 * exact


def test_the_greedy_follows_its_textbook_form_for_one_class() -> None:
    # docs/policies.md: by increasing work, each takes what still fits between every earlier release and later deadline
    rng = np.random.default_rng(6)
    arrival_s = np.sort(rng.uniform(0, 900, 3000))
    work_s = rng.lognormal(-1.5, 1.2, 3000)
    work_s = np.minimum(work_s, 2.0)
    most, least, done = 2 * (arrival_s + 2.0), 2 * arrival_s, np.zeros(3000)
    for j in np.argsort(work_s, kind="stable"):
        done[j] = max(0.0, min(work_s[j], most[j:].min() - least[: j + 1].max()))
        most[j:] -= done[j]
        least[j + 1 :] -= done[j]

    assert ttft_bound(arrival_s, work_s, arrival_s + 2.0, 2) == math.floor(np.sum(done / work_s) + 1e-6)


def earliest_deadline_first_keeps(jobs: list[tuple[float, float, float]]) -> bool:
    """Whether one preemptive machine can do all (release, work, deadline) in time."""
    left = {i: work for i, (_, work, _) in enumerate(jobs)}
    now = 0.0
    while left:
        ready = [i for i in left if jobs[i][0] <= now]
        if not ready:
            now = min(jobs[i][0] for i in left)
            continue
        i = min(ready, key=lambda i: jobs[i][2])
        until = min([now + left[i], *(jobs[k][0] for k in left if jobs[k][0] > now)])
        left[i] -= until - now
        now = until
        if left[i] <= 0:
            if now > jobs[i][2]:
                return False
            del left[i]
    return True


def best_schedule(jobs: list[tuple[float, float, float]], instances: int) -> int:
    """The most jobs in time over every choice of jobs and of the instance that does each."""
    best = 0
    for places in product(range(instances + 1), repeat=len(jobs)):  # `instances` = left out
        kept = sum(place < instances for place in places)
        if kept > best and all(
            earliest_deadline_first_keeps([job for job, place in zip(jobs, places, strict=True) if place == i])
            for i in range(instances)
        ):
            best = kept
    return best


@pytest.mark.parametrize(("instances", "n"), [(1, 7), (2, 5)])
@pytest.mark.parametrize("targets", TARGETS)
def test_no_schedule_of_a_few_requests_exceeds_the_bound(instances: int, n: int, targets: str) -> None:
    for seed in range(15):
        arrival_s, work_s, deadline_s = requests(seed, targets, n)
        arrival_s, deadline_s = arrival_s / 4, arrival_s / 4 + (deadline_s - arrival_s)  # crowd them

        bound = ttft_bound(arrival_s, work_s, deadline_s, instances)

        assert bound >= best_schedule(list(zip(arrival_s, work_s, deadline_s, strict=True)), instances), seed


@pytest.mark.parametrize("targets", TARGETS)
def test_more_instances_and_later_deadlines_never_lower_the_bound(targets: str) -> None:
    for seed in range(20):
        arrival_s, work_s, deadline_s = requests(seed, targets, n=60)
        later_s = deadline_s + np.random.default_rng(seed).choice([0.0, 3.0], len(deadline_s))
        bound = ttft_bound(arrival_s, work_s, deadline_s, 1)

        assert bound <= ttft_bound(arrival_s, work_s, deadline_s, 2)
        assert bound <= ttft_bound(arrival_s, work_s, later_s, 1)


def test_the_order_in_which_requests_are_listed_does_not_matter() -> None:
    arrival_s, work_s, deadline_s = requests(1, "any", n=60)
    shuffled = np.random.default_rng(0).permutation(len(work_s))

    assert ttft_bound(arrival_s[shuffled], work_s[shuffled], deadline_s[shuffled], 1) == ttft_bound(
        arrival_s, work_s, deadline_s, 1
    )


def test_requests_without_work_or_target_always_count_and_impossible_ones_never() -> None:
    arrival_s = np.zeros(4)

    assert ttft_bound(arrival_s, np.array([0.0, 1.0, 5.0, 1.0]), np.array([1.0, math.inf, 2.0, 1.0]), 1) == 3
    assert ttft_bound(np.array([]), np.array([]), np.array([]), 1) == 0


def test_the_least_work_is_the_marginal_cost_beyond_the_largest_cached_prefix() -> None:
    line = Line(0.01, 1e-5, 1e-9)
    prompt, cached, noise = np.array([1000, 1000, 1000]), np.array([0, 600, 1000]), np.array([1.0, 2.0, 1.0])

    marginal = lower_bound_work_s(line, prompt, cached, noise, pays_fixed_cost=False)
    whole = lower_bound_work_s(line, prompt, cached, noise, pays_fixed_cost=True)

    assert marginal == pytest.approx([1.05e-2, 2 * (4e-3 + 1e-9 * 400 * 800), 1e-5 + 1e-9 * 999.5])
    assert whole - marginal == pytest.approx(0.01 * noise)


def workload(arrival_s: FloatArray, prompt: ArrayLike, output: ArrayLike, ttft_s: float, tpot_s: ArrayLike) -> Workload:
    n = len(arrival_s)
    return Workload(
        trace="made-up",
        request_id=range(n),
        arrival_s=arrival_s,
        prompt_tokens=np.asarray(prompt, dtype=np.int64),
        output_tokens=np.asarray(output, dtype=np.int64),
        ttft_target_s=np.full(n, ttft_s),
        tpot_target_s=np.broadcast_to(np.asarray(tpot_s, dtype=np.float64), (n,)),
        slo_class=["default"] * n,
        tenant=[""] * n,
        model=[""] * n,
    )


def test_blocks_that_another_prompt_shares_from_the_start_could_be_cached() -> None:
    few = workload(np.zeros(4), [1100, 1024, 600, 10], [1] * 4, 1.0, 1.0)
    few = replace(few, block_ids=[(1, 2, 3), (1, 2), (9, 2), (9,)], block_tokens=512)

    assert shareable_tokens(few).tolist() == [1024, 1024, 512, 10]


PREFILL = Line(0.0, 1e-3, 0.0)
DECODE = Line(0.01, 0.001, 1e-6)


def end_to_end(some: Workload, decode: DecodeCapacity) -> int:
    work_s = lower_bound_work_s(
        PREFILL, some.prompt_tokens, np.zeros(len(some), dtype=np.int64), np.ones(len(some)), pays_fixed_cost=False
    )
    return end_to_end_bound(some, work_s, work_s, 1, decode)


def decode_side(n: int, *, instances: int = 1, kv_tokens: int = 10**6, batch_limit: int = 64) -> DecodeCapacity:
    return DecodeCapacity(DECODE, instances, kv_tokens, batch_limit, np.full(n, 0.005))


def crowd(seed: int, n: int = 40) -> Workload:
    rng = np.random.default_rng(seed)
    return workload(
        np.sort(rng.uniform(0, 8, n)),
        rng.integers(20, 400, n),
        rng.integers(1, 120, n),
        ttft_s=1.5,
        tpot_s=rng.choice([0.014, 0.02, 0.04], n),
    )


def test_decode_work_alone_limits_requests_that_arrive_together() -> None:
    # each has 100 steps of 1 ms of its own, half of a 10 ms step, and 6 ms in all for its context: 0.606 s.
    # All is between 0.014 s (prefill, transfer) and 1 + 100 x 0.02 s, where 4.9 of them fit
    ten = workload(np.zeros(10), [9] * 10, [101] * 10, ttft_s=1.0, tpot_s=0.02)

    assert end_to_end(ten, decode_side(10, batch_limit=2)) == 4
    assert end_to_end(ten, decode_side(10, batch_limit=2, instances=2)) == 9


def test_kv_room_alone_limits_requests_that_arrive_together() -> None:
    # each needs its 1,000 to 1,100 tokens of KV for 100 steps of 12 ms at least: 1.2 s of the 3 s there are
    ten = workload(np.zeros(10), [999] * 10, [101] * 10, ttft_s=10.0, tpot_s=0.02)
    wide = decode_side(10, kv_tokens=10**6)
    narrow = decode_side(10, kv_tokens=1200)

    assert end_to_end(ten, narrow) < end_to_end(ten, wide)


@pytest.mark.parametrize("seed", range(5))
def test_end_to_end_never_exceeds_ttft_alone_and_equals_it_when_decode_is_ample(seed: int) -> None:
    some = crowd(seed)
    work_s = np.asarray(PREFILL.b_s * some.prompt_tokens, dtype=np.float64)
    alone = ttft_bound(some.arrival_s, work_s, some.arrival_s + some.ttft_target_s, 1)
    easy = workload(some.arrival_s, some.prompt_tokens, some.output_tokens, ttft_s=1.5, tpot_s=1.0)

    assert end_to_end(some, decode_side(len(some))) <= alone
    assert end_to_end(easy, decode_side(len(some), instances=50)) == alone


@pytest.mark.parametrize("seed", range(5))
def test_more_decode_capacity_and_looser_targets_never_lower_the_end_to_end_bound(seed: int) -> None:
    some = crowd(seed)
    looser = workload(some.arrival_s, some.prompt_tokens, some.output_tokens, 1.5, some.tpot_target_s * 1.5)
    bound = end_to_end(some, decode_side(len(some), kv_tokens=800, batch_limit=4))

    assert bound <= end_to_end(some, decode_side(len(some), kv_tokens=800, batch_limit=4, instances=2))
    assert bound <= end_to_end(some, decode_side(len(some), kv_tokens=1600, batch_limit=4))
    assert bound <= end_to_end(some, decode_side(len(some), kv_tokens=800, batch_limit=8))
    assert bound <= end_to_end(looser, decode_side(len(some), kv_tokens=800, batch_limit=4))


def orders(n: int, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    yield list(range(n))
    for _ in range(30):
        yield rng.permutation(n)[: rng.integers(1, n + 1)].tolist()


def served_in_time(some: Workload, order: list[int], decode: DecodeCapacity) -> int:
    """What one prefill and one decode instance reach that serve `order` as it is and drop the rest."""
    now, ready = 0.0, []
    first = np.zeros(len(some))
    for i in order:  # prefill, whole prompts one after another
        now = max(now, some.arrival_s[i]) + PREFILL.b_s * some.prompt_tokens[i]
        first[i] = now
        ready.append((now + decode.transfer_s[i], i))
    last, now, batch = first.copy(), 0.0, dict[int, int]()
    while ready or batch:  # decode: everyone ready joins while batch and KV have room
        kv = sum(int(some.prompt_tokens[i]) + 1 + k for i, k in batch.items())
        while ready and len(batch) < decode.batch_limit and (ready[0][0] <= now or not batch):
            at, i = ready[0]
            context = int(some.prompt_tokens[i]) + 1
            if batch and kv + context + len(batch) + 1 > decode.kv_tokens:
                break
            now = max(now, at)
            ready.pop(0)
            if some.output_tokens[i] > 1:
                batch[i] = 0
                kv += context
        if batch:
            while kv + len(batch) > decode.kv_tokens and len(batch) > 1:  # the last to come gives up
                gone = list(batch)[-1]
                kv -= int(some.prompt_tokens[gone]) + 1 + batch.pop(gone)
                last[gone] = math.inf
            now += DECODE.a_s + DECODE.b_s * len(batch) + DECODE.c_s * kv
            for i in list(batch):
                batch[i] += 1
                last[i] = now
                if batch[i] == some.output_tokens[i] - 1:
                    del batch[i]
    in_time = [
        first[i] - some.arrival_s[i] <= some.ttft_target_s[i]
        and last[i] - first[i] <= (some.output_tokens[i] - 1) * some.tpot_target_s[i] + 1e-12
        for i in order
    ]
    return sum(in_time)


@pytest.mark.parametrize(("kv_tokens", "batch_limit"), [(10**6, 64), (10**6, 3), (900, 64)])
def test_no_order_of_service_exceeds_the_end_to_end_bound(kv_tokens: int, batch_limit: int) -> None:
    for seed in range(6):
        some = crowd(seed, n=25)
        decode = decode_side(25, kv_tokens=kv_tokens, batch_limit=batch_limit)

        best = max(served_in_time(some, order, decode) for order in orders(25, seed))

        assert 0 < best <= end_to_end(some, decode)


def in_time(case: Case) -> tuple[int, int]:
    """How many requests of a run of the reference kept TTFT, and TTFT and TPOT."""
    kept = []
    for (arrival_s, _, output, ttft_s, tpot_s), row in zip(
        case.requests, simulate(case.requests, case.fleet, case.strategy).rows, strict=True
    ):
        if row.first_token_s is not None and row.first_token_s - arrival_s <= ttft_s:
            last_s = row.first_token_s if row.last_token_s is None else row.last_token_s
            kept.append(output == 1 or (last_s - row.first_token_s) / (output - 1) <= tpot_s)
    return len(kept), sum(kept)


def bounds(case: Case) -> tuple[int, int]:
    """The same two numbers for any scheduler on the case's fleet."""
    arrival_s, prompt, output, ttft_s, tpot_s = (np.array(column) for column in zip(*case.requests, strict=True))
    some = replace(workload(arrival_s, prompt, output, 1.0, tpot_s), ttft_target_s=ttft_s)
    prefills, decodes, link = case.fleet["prefill"], case.fleet["decode"], case.fleet["kv_transfer"]
    nothing, exactly = np.zeros(len(some), dtype=np.int64), np.ones(len(some))
    lines = [Line(one["a"], one["b"], one["c"]) for one in prefills]
    work_s = np.min([lower_bound_work_s(line, some.prompt_tokens, nothing, exactly, True) for line in lines], axis=0)
    transfer_s = link["latency_s"] + some.prompt_tokens * link["bytes_per_token"] / link["bytes_per_s"]
    by_prefill = case.fleet["handover"]["first_token"] == "prefill"
    decode = DecodeCapacity(
        Line(*(min(one[letter] for one in decodes) for letter in "abc")),
        len(decodes),
        max(one["kv_tokens"] for one in decodes),
        2**62,
        transfer_s if by_prefill else np.zeros(len(some)),
    )
    alone = ttft_bound(arrival_s, work_s, arrival_s + ttft_s, len(prefills))
    return alone, end_to_end_bound(some, work_s, work_s, len(prefills), decode)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_run_of_the_reference_exceeds_its_bounds(case: Case) -> None:
    (ttft, both), (ttft_at_most, both_at_most) = in_time(case), bounds(case)

    assert ttft <= ttft_at_most <= len(case.trace)
    assert both <= both_at_most <= ttft_at_most
