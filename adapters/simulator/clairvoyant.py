"""What no scheduler could exceed, even one that knows the future.

Chunk limits and fixed step costs are dropped, a request may be served in fractions and by all instances at once, so m
instances are one machine of speed m. All work that is asked for must be a lower bound on what any scheduler spends.

`ttft_bound` is exact for that relaxation. `lp_bound` solves it on a grid of time, rounded outward: it is the test of
the greedy, and what `end_to_end_bound` adds decode work and KV room to.

Source: docs/policies.md; the feasible works of a fluid machine are a polymatroid, where greedy is exact (Edmonds 1970).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from kairos.adapters.simulator.tables import IntArray, Workload
from kairos.scheduler_core.domain import Line
from kairos.scheduler_core.errors import KairosError
from kairos.scheduler_core.slo import BoolArray, FloatArray

_TIGHT_S = 1e-9
"""Room below this is none, lateness up to it is rounding: far above that of sums of 1e5 s, far below any work."""
_ROUNDING_REQUESTS = 1e-3
"""Added before a bound is rounded down, so that rounding never takes a request away."""
PREFILL_SLOTS = 8192
"""Prefill windows last seconds."""
DECODE_SLOTS = 512
"""Decode windows last minutes: 2048 tightened the bound by 0.04 points and took up to three times as long."""
_GRID_ROUNDING = 1e-9
"""In slots: an instant this near a slot's edge lies on it."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one resource must give each request that is to count, and when it may. Arrays are (n,)."""

    start_s: FloatArray
    end_s: FloatArray
    """inf: at any time, which asks for nothing."""
    amount: FloatArray
    """Lower bounds; 0 asks for nothing."""
    per_s: float
    """How much of it there is each second."""
    slots: int
    """A power of two: into so many equal parts its time is cut, and windows are rounded outward to them."""

    def of(self, chosen: BoolArray) -> "Demand":
        """The chosen requests' part."""
        return Demand(self.start_s[chosen], self.end_s[chosen], self.amount[chosen], self.per_s, self.slots)


def lower_bound_work_s(
    line: Line, prompt_tokens: IntArray, cached_tokens: IntArray, noise: FloatArray, pays_fixed_cost: bool
) -> FloatArray:
    """The least seconds of prefill that any scheduler spends on each request, (n,).

    Args:
        line: Of the profile; for a fleet of several take the smallest of their works (`np.minimum`).
        prompt_tokens: (n,).
        cached_tokens: (n,) the most that could be cached; at least one token is always computed.
        noise: (n,) the realised factors.
        pays_fixed_cost: With max_requests_per_step 1 every request pays the fixed cost at least once.
    """
    context = np.minimum(cached_tokens, prompt_tokens - 1).astype(np.float64)
    new = prompt_tokens - context
    fixed_s = line.a_s if pays_fixed_cost else 0.0
    return noise * (fixed_s + line.b_s * new + line.c_s * new * (context + new / 2))


def shareable_tokens(workload: Workload) -> IntArray:
    """The most tokens of each prompt that a prefix cache could hold, (n,): those of blocks that another prompt shares.

    Which of the two comes first does not matter: a scheduler that knows the future may let either wait.
    """
    if workload.block_ids is None:
        return np.zeros(len(workload), dtype=np.int64)
    nodes: dict[tuple[int, int], int] = {}  # (node of the blocks before, block id) -> node; 0 = no block
    paths = []
    for blocks in workload.block_ids:
        path = [0]
        for block in blocks:
            path.append(nodes.setdefault((path[-1], block), len(nodes) + 1))
        paths.append(path[1:])
    prompts_at = Counter(node for path in paths for node in path)
    shared = np.array([sum(prompts_at[node] > 1 for node in path) for path in paths], dtype=np.int64)
    return np.minimum(shared * workload.block_tokens, workload.prompt_tokens)


def ttft_bound(arrival_s: FloatArray, work_s: FloatArray, deadline_s: FloatArray, instances: int) -> int:
    """The most requests whose work can be done in time, for any deadlines; O(n) NumPy per request.

    Requests enter by deadline. One that does not fit takes the place of larger ones: of those that compete with it for
    the shortest stretch of time without room, the largest gives way first, as far as needed. That keeps the sum of
    work done / p_j the greatest possible (the exchange form of the greedy by increasing p_j; it needs no order of
    deadlines, as there is one stretch for each release and not one for each release and deadline).

    Args:
        arrival_s: (n,) in any order.
        work_s: (n,) lower bounds on the work, p_j. Requests that alone would be late do not count; leave out also
            those that are late only with the fixed cost that `work_s` does not hold.
        deadline_s: (n,).
        instances: m.
    """
    possible = arrival_s + work_s <= deadline_s + _TIGHT_S
    free = int(np.count_nonzero(possible & (work_s == 0.0)))
    possible &= work_s > 0.0
    by_release = np.flatnonzero(possible)[np.argsort(arrival_s[possible], kind="stable")]
    release_s, size_s, due_s = arrival_s[by_release], work_s[by_release], deadline_s[by_release]
    done_s = np.zeros(len(size_s))
    movable_s = np.full(len(size_s), -math.inf)
    """Size of the requests that hold some work, -inf for the others."""
    # room[i] + m * d: work that still fits between the i-th release and d, the latest deadline so far
    room_s = -instances * release_s
    for j in np.argsort(due_s, kind="stable"):
        until_s = instances * due_s[j]
        missing_s = size_s[j]
        movable_s[j] = size_s[j]
        while missing_s > 0.0:
            slack_s = until_s + room_s[: j + 1]
            fits_s = slack_s.min()
            if fits_s > _TIGHT_S:
                moved_s = min(missing_s, fits_s)
            else:
                full_from = j - int(np.argmax(slack_s[::-1] <= _TIGHT_S))  # the last release without room
                largest = full_from + int(np.argmax(movable_s[full_from:]))
                if movable_s[largest] <= size_s[j]:
                    break
                moved_s = min(missing_s, done_s[largest])
                if largest < j:
                    moved_s = min(moved_s, slack_s[largest + 1 :].min())
                done_s[largest] -= moved_s
                if done_s[largest] <= 0.0:
                    movable_s[largest] = -math.inf
                room_s[: largest + 1] += moved_s
            done_s[j] += moved_s
            missing_s -= moved_s
            room_s[: j + 1] -= moved_s
        if done_s[j] == 0.0:
            movable_s[j] = -math.inf
    return free + _whole(float(np.sum(done_s / size_s)))


def lp_bound(demands: Sequence[Demand]) -> int:
    """The most requests all of whose demands can be met in their windows, which are rounded outward to a grid.

    A window is a few nodes of the binary tree over the slots, and what a request puts into a node flows down to any
    slot below it: a few columns a request however long its window. More slots cost time and tighten the bound.

    Args:
        demands: At least one; all of the same n requests, each with end >= start.

    Raises:
        KairosError: The solver stopped without an optimum.
    """
    n = len(demands[0].amount)
    program = _Program()
    served = program.columns(n)
    for demand in demands:
        asking = np.flatnonzero((demand.amount > 0.0) & np.isfinite(demand.end_s))
        if asking.size:
            _ask(program, served[asking], demand, asking)
    if not program.limits:
        return n
    bounds = np.zeros((program.width, 2))
    bounds[:, 1] = math.inf
    bounds[served, 1] = 1.0
    cost = np.zeros(program.width)
    cost[served] = -1.0
    found = linprog(cost, program.matrix(), program.limit(), bounds=bounds)  # type: ignore[call-overload]  # sparse
    if found.x is None:
        raise KairosError(f"the bound's linear program over {n} requests was not solved: {found.message}")
    return _whole(-float(found.fun))


@dataclass(frozen=True, slots=True)
class DecodeCapacity:
    """What the decode instances can give at best; for several profiles the best of each number."""

    line: Line
    """Of the decode step."""
    instances: int
    kv_tokens: int
    """Of one instance."""
    batch_limit: int
    transfer_s: FloatArray
    """(n,) seconds between a request's first token and its KV's arrival; 0 if the first token comes from decode."""
    noise_floor: float = 1.0
    """The smallest factor that a decode step's noise can have."""


def end_to_end_bound(
    workload: Workload,
    work_s: FloatArray,
    isolated_s: FloatArray,
    instances: int,
    decode: DecodeCapacity,
) -> int:
    """The most requests that can meet TTFT and TPOT both.

    TPOT only says when the last token is due: at the latest (output - 1) targets after the TTFT deadline. Until then a
    request that counts has had its prefill work, its decode work with at least its share of the fixed step cost, and,
    for at least as long as its own steps take alone, room for its KV.

    Args:
        workload: n requests.
        work_s: (n,) `lower_bound_work_s`.
        isolated_s: (n,) the shortest possible TTFT.
        instances: Prefill instances.
        decode: The decode side.

    Raises:
        KairosError: The solver stopped without an optimum.
    """
    a_s, b_s, c_s = decode.line
    steps = np.maximum(workload.output_tokens - 1, 0).astype(np.float64)
    first = workload.prompt_tokens + 1.0  # context of the first step; step k has k more
    contexts = steps * first + steps * (steps - 1) / 2
    squares = steps * first**2 + first * steps * (steps - 1) + (steps - 1) * steps * (2 * steps - 1) / 6
    room = decode.kv_tokens // int(np.min(first, initial=2**62) + 1)
    batch = max(1, min(decode.batch_limit, room))
    steps_work_s = decode.noise_floor * (b_s * steps + c_s * contexts)
    alone_s = steps_work_s + decode.noise_floor * a_s * steps
    # sum over the steps of (context + 1) x their own time; one too large for the KV is let in alone, and not counted
    kv_token_s = decode.noise_floor * ((a_s + b_s) * (contexts + steps) + c_s * (squares + contexts))
    kv_token_s[first + steps > decode.kv_tokens] = 0.0

    with np.errstate(invalid="ignore"):  # no step and no target: 0 x inf
        for_steps_s = np.where(steps > 0, steps * workload.tpot_target_s, 0.0)
    possible = isolated_s <= workload.ttft_target_s + _TIGHT_S
    possible &= (steps == 0) | (decode.transfer_s + alone_s <= for_steps_s + _TIGHT_S)
    deadline_s = workload.arrival_s + workload.ttft_target_s
    ready_s = workload.arrival_s + isolated_s + decode.transfer_s
    own_work_s = steps_work_s + decode.noise_floor * a_s * steps / batch
    demands = [
        Demand(workload.arrival_s, deadline_s, work_s, instances, PREFILL_SLOTS),
        Demand(ready_s, deadline_s + for_steps_s, own_work_s, decode.instances, DECODE_SLOTS),
        Demand(ready_s, deadline_s + for_steps_s, kv_token_s, decode.instances * decode.kv_tokens, DECODE_SLOTS),
    ]
    together = lp_bound([demand.of(possible) for demand in demands])
    return min(
        together, ttft_bound(workload.arrival_s[possible], work_s[possible], deadline_s[possible], instances)
    )  # the second needs no grid


class _Program:
    """Rows `sum of entries <= limit` of a sparse linear program, in the making."""

    def __init__(self) -> None:
        self.width = 0
        self.limits: list[FloatArray] = []
        self._height = 0
        self._entries: list[tuple[IntArray, IntArray, FloatArray]] = []

    def columns(self, count: int) -> IntArray:
        """New variables, not negative."""
        self.width += count
        return np.arange(self.width - count, self.width)

    def rows(self, limit: FloatArray) -> IntArray:
        """New rows."""
        self.limits.append(limit)
        self._height += len(limit)
        return np.arange(self._height - len(limit), self._height)

    def add(self, row: IntArray, column: IntArray, value: FloatArray | float) -> None:
        """Entries, one an element; those of one place add up."""
        self._entries.append((row, column, np.broadcast_to(np.asarray(value, dtype=np.float64), row.shape)))

    def matrix(self) -> coo_array:
        """All entries."""
        row, column, value = (np.concatenate(parts) for parts in zip(*self._entries, strict=True))
        return coo_array((value, (row, column)), shape=(self._height, self.width))

    def limit(self) -> FloatArray:
        """All limits."""
        return np.concatenate(self.limits)


def _ask(program: _Program, served: IntArray, demand: Demand, asking: IntArray) -> None:
    """Let requests `asking` be served only as far as their demand is met. The unit of flow is a slot's capacity."""
    slots = demand.slots
    start_s, end_s = demand.start_s[asking], demand.end_s[asking]
    origin_s = float(start_s.min())
    slot_s = max(float(end_s.max()) - origin_s, _TIGHT_S) / slots
    first = np.floor((start_s - origin_s) / slot_s + _GRID_ROUNDING).astype(np.int64)
    last = np.ceil((end_s - origin_s) / slot_s - _GRID_ROUNDING).astype(np.int64)
    owner, node = _tree_nodes(np.clip(first, 0, slots - 1), np.clip(last, 1, slots), slots)

    put = program.columns(len(owner))
    enough = program.rows(np.zeros(len(asking)))
    program.add(enough, served, 1.0)
    program.add(enough[owner], put, -1.0)

    down = program.columns(2 * slots)  # down[v]: what flows into node v from above; nodes 1 to 2 slots - 1
    nodes = np.arange(1, 2 * slots)
    inner = nodes[: slots - 1]
    holds = program.rows((np.arange(2 * slots) >= slots).astype(np.float64))
    program.add(holds[node], put, demand.amount[asking][owner] / (demand.per_s * slot_s))
    program.add(holds[nodes[1:]], down[nodes[1:]], 1.0)
    program.add(holds[inner], down[2 * inner], -1.0)
    program.add(holds[inner], down[2 * inner + 1], -1.0)


def _tree_nodes(first: IntArray, last: IntArray, slots: int) -> tuple[IntArray, IntArray]:
    """The fewest nodes of the binary tree (root 1, leaves `slots` to 2 slots - 1) that cover slots [first, last).

    Returns:
        Whose window, and which node; one pair an element.
    """
    low, high = first + slots, last + slots
    owners, nodes = [], []
    while np.any(low < high):
        odd = (low < high) & (low % 2 == 1)
        owners.append(np.flatnonzero(odd))
        nodes.append(low[odd])
        low = low + odd
        odd = (low < high) & (high % 2 == 1)
        high = high - odd
        owners.append(np.flatnonzero(odd))
        nodes.append(high[odd])
        low, high = low // 2, high // 2
    return np.concatenate(owners), np.concatenate(nodes)


def _whole(requests: float) -> int:
    return math.floor(requests + _ROUNDING_REQUESTS)
