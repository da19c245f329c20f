"""The rules of docs/simulator.md written down a second time: slow, plain, and sharing nothing with Kairos.

Takes plain lists and dicts, imports no project code, keeps no sorted index, and looks at every waiting request at every
decision, so that each rule can be read beside its text. It covers what exact comparisons need: six ordering rules of
docs/policies.md with `lost_last` and `preempt`, the placements `late`, `round-robin` and (decode)
`least-requests`, and `continuous`, `capped` and `slack`; noise 0, share guard off, no prefix cache, no KV contention.

Seconds and tokens. Where the text leaves room, "Reading:" says which way was taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

Request = tuple[float, int, int, float, float]
"""(arrival_s, prompt_tokens, output_tokens, ttft_target_s, tpot_target_s)."""
Spec = dict[str, Any]
"""One instance: a, b, c of its own kind of step, and its limits."""


class Row(NamedTuple):
    """What became of one request; None = not applicable."""

    prefill_instance: int | None
    decode_instance: int | None
    prefill_start_s: float | None
    first_token_s: float | None
    decode_ready_s: float | None
    last_token_s: float | None
    max_itl_s: float | None
    status: str


class Step(NamedTuple):
    """One step; `request_ids` ascending. `sum_context_tokens` as in steps.csv: before the step."""

    instance: str
    start_s: float
    end_s: float
    request_ids: tuple[int, ...]
    sum_context_tokens: int


class Result(NamedTuple):
    """A whole run: one row a request by id, the steps in the order they began, and what decode had to do."""

    rows: list[Row]
    steps: list[Step]
    swap_outs: int
    skipped: int
    """Residents that a decode step left out, summed over the steps."""


@dataclass(eq=False)
class Job:
    """A request on its way."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_target_s: float
    tpot_target_s: float
    prefilled_tokens: int = 0
    prefill_instance: int | None = None
    prefill_start_s: float | None = None
    ready_s: float | None = None
    decode_instance: int | None = None
    token_times_s: list[float] = field(default_factory=list)

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.ttft_target_s

    @property
    def context_tokens(self) -> int:
        """Prompt + 1 + later tokens emitted (rule 2).

        Reading: "later" means after the first token. With `first_token: decode` a request so enters decode with
        prompt + 1, and still has prompt + 1 once its first token is out.
        """
        later_tokens = max(0, len(self.token_times_s) - 1)
        return self.prompt_tokens + 1 + later_tokens

    @property
    def finished(self) -> bool:
        return len(self.token_times_s) == self.output_tokens


@dataclass(eq=False)
class Prefill:
    """A prefill instance; `job` is None while it is idle."""

    spec: Spec
    job: Job | None = None
    new_tokens: int = 0
    end_s: float = 0.0


@dataclass(eq=False)
class Decode:
    """A decode instance; `participants` is empty while it is idle."""

    spec: Spec
    residents: list[Job] = field(default_factory=list)
    """In the order they were admitted."""
    ready: list[Job] = field(default_factory=list)
    """Placed here and not admitted: in ready order, swapped-out ones in front."""
    participants: list[Job] = field(default_factory=list)
    end_s: float = 0.0


def prefill_step_s(spec: Spec, new_tokens: int, context_tokens: int) -> float:
    """Rule 1 for a step of one request: a + b*new + c*new*(ctx + new/2)."""
    return float(spec["a"] + (spec["b"] * new_tokens + spec["c"] * new_tokens * (context_tokens + new_tokens / 2)))


def decode_step_s(spec: Spec, jobs: Sequence[Job]) -> float:
    """Rule 2: a + b*B + c*S."""
    return float(spec["a"] + spec["b"] * len(jobs) + spec["c"] * sum(job.context_tokens for job in jobs))


def next_chunk_tokens(spec: Spec, job: Job, done_tokens: int) -> int:
    """The next piece of a prompt of which `done_tokens` are computed."""
    left = job.prompt_tokens - done_tokens
    return left if spec["chunk_tokens"] is None else min(left, spec["chunk_tokens"])


def remaining_s(spec: Spec, job: Job) -> float:
    """Rule 1: the sum over the chunks still to run, the last one shorter."""
    seconds = 0.0
    done_tokens = job.prefilled_tokens
    while done_tokens < job.prompt_tokens:
        new_tokens = next_chunk_tokens(spec, job, done_tokens)
        seconds += prefill_step_s(spec, new_tokens, done_tokens)
        done_tokens += new_tokens
    return seconds


def _urgency(t: float, p: float, job: Job) -> tuple[float, ...]:
    u = (t + p - job.arrival_s) / job.ttft_target_s
    return (0, -u) if u <= 1 else (1, job.arrival_s)


ORDER: dict[str, Callable[[float, float, Job], tuple[float, ...]]] = {
    "fcfs": lambda t, p, job: (job.arrival_s,),
    "sjf": lambda t, p, job: (p,),
    "aged-sjf": lambda t, p, job: (-((t - job.arrival_s) + p) / p,),
    "edf": lambda t, p, job: (job.deadline_s,),
    "least-laxity": lambda t, p, job: (job.deadline_s - t - p,),
    "urgency": _urgency,
}
"""Rule by name: (now, predicted remaining seconds, request) -> key; the smallest runs first, ties to the lowest id."""


class Simulation:
    """One run; `run` is the whole of rule 4, the other methods are named after what they decide."""

    def __init__(self, requests: Sequence[Request], fleet: dict[str, Any], strategy: dict[str, Any]) -> None:
        assert strategy["prefill"] in ORDER
        assert strategy["prefill_placement"] in ("late", "round-robin")
        assert strategy["decode_placement"] == "least-requests"
        assert strategy["decode"] in ("continuous", "capped", "slack")
        assert fleet["handover"]["place_decode"] == "at_ready"
        in_order = sorted(requests, key=lambda request: request[0])  # stable: ties keep the order of the file
        self.jobs = [Job(i, *request) for i, request in enumerate(in_order)]
        self.prefill = [Prefill(spec) for spec in fleet["prefill"]]
        self.decode = [Decode(spec) for spec in fleet["decode"]]
        self.kv_transfer = fleet["kv_transfer"]
        self.first_token_by_decode = fleet["handover"]["first_token"] == "decode"
        self.strategy = strategy
        self.to_arrive = list(self.jobs)
        self.waiting: list[Job] = []  # arrived and not wholly prefilled
        self.in_transfer: list[Job] = []
        self.arrivals = 0
        self.steps: list[Step] = []
        self.swap_outs = 0
        self.skipped = 0

    def run(self) -> Result:
        while (t := self.next_instant()) is not None:
            for prefill in self.prefill:
                if prefill.job is not None and prefill.end_s == t:
                    self.end_prefill(prefill, prefill.job, t)
            for decode in self.decode:
                if decode.participants and decode.end_s == t:
                    self.end_decode(decode, t)
            for job in [job for job in self.in_transfer if job.ready_s == t]:  # kept in id order
                self.in_transfer.remove(job)
                self.place_decode(job)
            while self.to_arrive and self.to_arrive[0].arrival_s == t:
                self.arrive(self.to_arrive.pop(0))
            for index, prefill in enumerate(self.prefill):
                if prefill.job is None:
                    self.begin_prefill(index, prefill, t)
            for index, decode in enumerate(self.decode):
                if not decode.participants:
                    self.begin_decode(index, decode, t)
        return Result([row(job) for job in self.jobs], self.steps, self.swap_outs, self.skipped)

    def next_instant(self) -> float | None:
        times = [prefill.end_s for prefill in self.prefill if prefill.job is not None]
        times += [decode.end_s for decode in self.decode if decode.participants]
        times += [job.ready_s for job in self.in_transfer if job.ready_s is not None]
        times += [job.arrival_s for job in self.to_arrive[:1]]
        return min(times, default=None)

    # -- prefill ---------------------------------------------------------------------------------------------------

    def arrive(self, job: Job) -> None:
        if self.strategy["prefill_placement"] == "round-robin":
            job.prefill_instance = self.arrivals % len(self.prefill)
        self.arrivals += 1
        self.waiting.append(job)

    def begin_prefill(self, index: int, prefill: Prefill, t: float) -> None:
        """Rule 5: chooses among the requests bound here and those bound nowhere yet."""
        candidates = [job for job in self.waiting if job.prefill_instance in (None, index)]
        if not candidates:
            return
        begun = [job for job in candidates if job.prefilled_tokens > 0]
        if begun and not self.strategy["preempt"]:
            job = begun[0]
        else:
            job = min(candidates, key=lambda job: self.rank(prefill.spec, job, t))
        if job.prefill_start_s is None:
            job.prefill_start_s = t
        job.prefill_instance = index
        prefill.job = job
        prefill.new_tokens = next_chunk_tokens(prefill.spec, job, job.prefilled_tokens)
        prefill.end_s = t + prefill_step_s(prefill.spec, prefill.new_tokens, job.prefilled_tokens)
        self.steps.append(Step(f"prefill-{index}", t, prefill.end_s, (job.request_id,), job.prefilled_tokens))

    def rank(self, spec: Spec, job: Job, t: float) -> tuple[bool, tuple[float, ...], int]:
        """The smallest runs first. Reading: predictions are those of the instance that asks, also under `late`."""
        p = remaining_s(spec, job)
        lost = t + p > job.deadline_s
        if self.strategy["lost_last"] and lost:
            return True, (job.arrival_s,), job.request_id
        return False, ORDER[self.strategy["prefill"]](t, p, job), job.request_id

    def end_prefill(self, prefill: Prefill, job: Job, t: float) -> None:
        """Rule 3. Reading: with `first_token: decode` the transfer starts at the end of the prefill."""
        job.prefilled_tokens += prefill.new_tokens
        prefill.job = None
        if job.prefilled_tokens < job.prompt_tokens:
            return
        self.waiting.remove(job)
        if not self.first_token_by_decode:
            job.token_times_s.append(t)
        if not job.finished:
            transfer = self.kv_transfer
            bytes_s = job.prompt_tokens * transfer["bytes_per_token"] / transfer["bytes_per_s"]
            job.ready_s = t + transfer["latency_s"] + bytes_s
            self.in_transfer.append(job)
            self.in_transfer.sort(key=lambda job: job.request_id)

    # -- decode ----------------------------------------------------------------------------------------------------

    def place_decode(self, job: Job) -> None:
        """Rule 6, `least-requests`: residents + waiting there, ties to the lowest index."""
        loads = [len(decode.residents) + len(decode.ready) for decode in self.decode]
        job.decode_instance = loads.index(min(loads))
        self.decode[job.decode_instance].ready.append(job)

    def begin_decode(self, index: int, decode: Decode, t: float) -> None:
        self.swap_out(decode)
        self.admit(decode)
        if not decode.residents:
            return
        decode.participants = self.choose(decode)
        decode.end_s = t + decode_step_s(decode.spec, decode.participants)
        self.skipped += len(decode.residents) - len(decode.participants)
        ids = tuple(sorted(job.request_id for job in decode.participants))
        sum_context = sum(job.context_tokens for job in decode.participants)
        self.steps.append(Step(f"decode-{index}", t, decode.end_s, ids, sum_context))

    def swap_out(self, decode: Decode) -> None:
        """While the step could overflow the KV cache, the last admitted goes to the front of those waiting."""
        residents = decode.residents
        while (
            len(residents) > 1
            and sum(job.context_tokens for job in residents) + len(residents) > decode.spec["kv_tokens"]
        ):
            decode.ready.insert(0, residents.pop())
            self.swap_outs += 1

    def admit(self, decode: Decode) -> None:
        """Reading: under `slack` a swapped-out request has no precedence but among equal contexts."""
        if self.strategy["decode"] == "slack":
            queue = sorted(decode.ready, key=lambda job: job.context_tokens)  # stable: ties in ready order
        else:
            queue = list(decode.ready)
        for job in queue:
            if not self.may_enter(decode, job):
                return
            decode.ready.remove(job)
            decode.residents.append(job)

    def may_enter(self, decode: Decode, job: Job) -> bool:
        spec, residents = decode.spec, decode.residents
        if not residents:
            return True
        rule = self.strategy["decode"]
        cap = spec["batch_limit"] if rule == "slack" else spec["max_batch"]
        if cap is not None and len(residents) + 1 > cap:
            return False
        sum_context = sum(resident.context_tokens for resident in residents)
        if sum_context + job.context_tokens + len(residents) + 1 > spec["kv_tokens"]:
            return False
        everyone = [*residents, job]
        return rule != "capped" or decode_step_s(spec, everyone) <= min(one.tpot_target_s for one in everyone)

    def choose(self, decode: Decode) -> list[Job]:
        """Who takes part in the step: all, but for `slack`, which fits it into h x the tightest target."""
        residents = decode.residents
        if self.strategy["decode"] != "slack":
            return list(residents)
        limit_s = self.strategy["h"] * min(job.tpot_target_s for job in residents)
        if decode_step_s(decode.spec, residents) <= limit_s:
            return list(residents)
        chosen: list[Job] = []
        for job in sorted(residents, key=lambda job: (job.context_tokens, job.request_id)):
            if chosen and decode_step_s(decode.spec, [*chosen, job]) > limit_s:
                break
            chosen.append(job)
        return chosen

    def end_decode(self, decode: Decode, t: float) -> None:
        for job in decode.participants:
            job.token_times_s.append(t)
        decode.participants = []
        decode.residents = [job for job in decode.residents if not job.finished]


def row(job: Job) -> Row:
    """The columns of requests.csv; the first token counts as one end of the first gap."""
    times = job.token_times_s
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Row(
        prefill_instance=job.prefill_instance,
        decode_instance=job.decode_instance,
        prefill_start_s=job.prefill_start_s,
        first_token_s=times[0] if times else None,
        decode_ready_s=job.ready_s,
        last_token_s=times[-1] if job.finished else None,
        max_itl_s=max(gaps, default=None),
        status="finished" if job.finished else "unfinished",
    )


def simulate(requests: Sequence[Request], fleet: dict[str, Any], strategy: dict[str, Any]) -> Result:
    """Runs until nothing is left to do.

    Args:
        requests: in any order; ids are ranks by (arrival, place in the list).
        fleet: `prefill` [{a, b, c, chunk_tokens, max_requests_per_step}], `decode` [{a, b, c, max_batch, batch_limit,
            kv_tokens}], `kv_transfer` {bytes_per_token, bytes_per_s, latency_s}, `handover` {first_token,
            place_decode}. None = no chunks, no batch limit.
        strategy: prefill, lost_last, preempt, prefill_placement, decode_placement, decode, and h with `slack`.
    """
    return Simulation(requests, fleet, strategy).run()
