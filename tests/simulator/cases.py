"""Cases that compare two simulators: workload, fleet and strategy, and the files that `kairos simulate` takes.

Two families. In *timed* ones step times look like measured ones and hardly any two events coincide. In *grid* ones all
coefficients, lengths and arrivals are multiples of powers of two, so that every sum is exact, many events share an
instant, and what a rule says about ties and about `<` against `<=` decides.

Everything follows from the case's name: its random numbers are seeded by it.
"""

import math
import random
import zlib
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import yaml
from simulator.reference import ORDER, Request, Spec

NO_KV_LIMIT = 10_000_000
NO_TIME_BYTES_PER_S = 1e30
"""A link so fast that a transfer takes no time as doubles see it."""


@dataclass(frozen=True)
class Case:
    """One run to compare. Fleet and strategy are dicts as `reference.simulate` takes them."""

    name: str
    classes: dict[str, tuple[float, float]]
    """(ttft_s, tpot_s) by name."""
    trace: list[tuple[float, int, int, str]]
    """(arrival_s, input_tokens, output_tokens, slo_class), by arrival."""
    fleet: dict[str, Any]
    strategy: dict[str, Any]

    @property
    def requests(self) -> list[Request]:
        """The trace with the targets of its classes."""
        return [
            (arrival, prompt, output, *self.classes[slo_class]) for arrival, prompt, output, slo_class in self.trace
        ]


# -- the public files of a case (docs/files.md, docs/configuration.md) -------------------------------------------------


def to_trace_csv(case: Case) -> str:
    """The trace file."""
    lines = [f"{arrival!r},{prompt},{output},{slo_class}" for arrival, prompt, output, slo_class in case.trace]
    return "\n".join(["arrival_s,input_tokens,output_tokens,slo_class", *lines, ""])


def strategy_text(case: Case) -> str:
    """The strategy as `--strategy` takes it.

    >>> strategy_text(by_name("first-token-by-decode-slack-timed"))
    'edf(lost_last=true,preempt=true)+late+least-requests+slack(h=0.9)'
    """
    strategy = case.strategy
    options = ",".join(f"{option}=true" for option in ("lost_last", "preempt") if strategy[option])
    prefill = f"{strategy['prefill']}({options})" if options else strategy["prefill"]
    decode = f"slack(h={strategy['h']})" if strategy["decode"] == "slack" else strategy["decode"]
    return f"{prefill}+{strategy['prefill_placement']}+{strategy['decode_placement']}+{decode}"


def to_yaml(case: Case) -> str:
    """The configuration file; its active strategy is the case's own."""
    strategy = case.strategy
    options = {option: True for option in ("lost_last", "preempt") if strategy[option]}
    profiles: dict[str, Any] = {}
    fleet: dict[str, Any] = {}
    for kind, other in (("prefill", "decode"), ("decode", "prefill")):
        groups = []
        for i, (spec, same) in enumerate(groupby(case.fleet[kind])):
            name = f"{kind}-profile-{i}"
            lines = {kind: _line(spec), other: _line(case.fleet[other][0])}
            identity = {"gpu": f"{kind}{i}", "model": "a-model", "precision": "bf16", "tp": 1, "engine": "vllm"}
            profiles[name] = identity | {"step_times": {"linear": lines}}
            limits = {key: value for key, value in spec.items() if key not in ("a", "b", "c")}
            if limits.get("batch_limit", 0) is None:
                del limits["batch_limit"]
            groups.append({"count": len(list(same)), "profile": name} | limits)
        fleet[kind] = groups
    document = {
        "profiles": profiles,
        "fleet": fleet | {"kv_transfer": case.fleet["kv_transfer"], "handover": case.fleet["handover"]},
        "slo": {"classes": {name: {"ttft_s": ttft, "tpot_s": tpot} for name, (ttft, tpot) in case.classes.items()}},
        "guards": {"deferred_share": 0},
        "strategies": {
            "under-test": {
                "prefill": {"name": strategy["prefill"], **options},
                "prefill_placement": strategy["prefill_placement"],
                "decode_placement": strategy["decode_placement"],
                "decode": {"name": "slack", "h": strategy["h"]}
                if strategy["decode"] == "slack"
                else strategy["decode"],
                "admission": "accept-all",
            }
        },
        "active": "under-test",
    }
    return yaml.safe_dump(document, sort_keys=False)


def _line(spec: Spec) -> dict[str, float]:
    return {"a_s": spec["a"], "b_s": spec["b"], "c_s": spec["c"]}


# -- parts of cases ----------------------------------------------------------------------------------------------------


def prefill(a: float, b: float, c: float, chunk_tokens: int | None) -> Spec:
    """A prefill instance. The rules compared here run one request a step, whatever the engine could pack."""
    return {"a": a, "b": b, "c": c, "chunk_tokens": chunk_tokens, "max_requests_per_step": 8}


def decode(a: float, b: float, c: float, max_batch: int = 64, kv: int = NO_KV_LIMIT, limit: int | None = None) -> Spec:
    """A decode instance."""
    return {"a": a, "b": b, "c": c, "max_batch": max_batch, "batch_limit": limit, "kv_tokens": kv}


def timed_prefill(speed: float = 1.0, chunk_tokens: int | None = 4096) -> Spec:
    """About a B300 with a 32B model, or `speed` times as fast."""
    return prefill(0.0082 / speed, 1.48e-5 / speed, 3.9e-10 / speed, chunk_tokens)


def timed_decode(speed: float = 1.0, **limits: Any) -> Spec:
    """Slow enough to fill batches with short outputs."""
    return decode(0.03 / speed, 0.0013 / speed, 2.3e-8 / speed, **limits)


def grid_prefill(speed: float = 1.0, chunk_tokens: int | None = 1024) -> Spec:
    """256 tokens take 0.25 s, a step 0.25 s more."""
    return prefill(0.25 / speed, 2**-10 / speed, 0.0, chunk_tokens)


def grid_decode(speed: float = 1.0, **limits: Any) -> Spec:
    """0.25 s a step and 0.125 s a participant."""
    return decode(0.25 / speed, 0.125 / speed, 0.0, **limits)


TIMED_CLASSES = {"default": (0.8, 0.06), "tight": (0.3, 0.045), "loose": (3.0, 0.15)}
GRID_CLASSES = {"default": (4.0, 1.0), "tight": (2.0, 0.75), "loose": (16.0, 2.0)}
TRANSFER = {"bytes_per_token": 262144, "bytes_per_s": 25000000000, "latency_s": 0.002}
GRID_TRANSFER = {"bytes_per_token": 1, "bytes_per_s": 1024, "latency_s": 0.25}
NO_TRANSFER = {"bytes_per_token": 1, "bytes_per_s": NO_TIME_BYTES_PER_S, "latency_s": 0}


def strategy(
    rule: str,
    lost_last: bool = False,
    preempt: bool = False,
    placement: str = "late",
    decode: str = "continuous",
    h: float = 0.9,
) -> dict[str, Any]:
    """A strategy as `reference.simulate` takes it."""
    slack = {"h": h} if decode == "slack" else {}
    return {
        "prefill": rule,
        "lost_last": lost_last,
        "preempt": preempt,
        "prefill_placement": placement,
        "decode_placement": "least-requests",
        "decode": decode,
    } | slack


def make(
    name: str,
    strategy: dict[str, Any],
    prefills: list[Spec],
    decodes: list[Spec],
    grid: bool = False,
    requests: int = 200,
    load: float = 1.1,
    outputs: int = 12,
    one_token_share: float = 0.1,
    first_token: str = "prefill",
    transfer: dict[str, Any] | None = None,
    short_prompts: bool = False,
) -> Case:
    """A case whose prompts are long-tailed, whose arrivals come in bursts, and whose outputs have a mean of `outputs`.

    Arrivals are stretched so that prefill work offered = `load` per instance and second. With short prompts (a
    sixteenth) it is the outputs that fill a KV cache.
    """
    rng = random.Random(zlib.crc32(name.encode()))
    unit, median, longest = (256, 4, 24) if grid else (16, 190, 3000)
    if short_prompts:
        unit //= 16
    prompts = [unit * min(longest, max(1, round(median * math.exp(rng.gauss(0, 1))))) for _ in range(requests)]
    gaps = [0.0 if rng.random() < 0.3 else rng.expovariate(1) for _ in range(requests)]
    work_s = sum(sum(one["a"] + one["b"] * n + one["c"] * n * n / 2 for one in prefills) for n in prompts)
    stretch = work_s / len(prefills) ** 2 / load / sum(gaps)
    classes = GRID_CLASSES if grid else TIMED_CLASSES
    trace = []
    arrival_s = 0.0
    for prompt, gap in zip(prompts, gaps, strict=True):
        arrival_s += gap * stretch
        output = 1 if rng.random() < one_token_share else 2 + int(rng.expovariate(1 / (outputs - 2)))
        at = math.floor(arrival_s / 0.25) * 0.25 if grid else arrival_s
        trace.append((at, prompt, output, rng.choice(list(classes))))
    fleet = {
        "prefill": prefills,
        "decode": decodes,
        "kv_transfer": transfer or (GRID_TRANSFER if grid else TRANSFER),
        "handover": {"first_token": first_token, "place_decode": "at_ready"},
    }
    return Case(name, classes, trace, fleet, strategy)


# -- the cases ---------------------------------------------------------------------------------------------------------


def _every_rule() -> list[Case]:
    """Each rule with and without each option, in both families; placement, decode rule and fleet size vary along."""
    cases = []
    combinations = list(product(ORDER, (False, True), (False, True), (False, True)))
    for i, (rule, lost_last, preempt, grid) in enumerate(combinations):
        options = "".join(f"-{option}" for option, on in (("lost_last", lost_last), ("preempt", preempt)) if on)
        name = f"{rule}{options}-{'grid' if grid else 'timed'}"
        placement = "round-robin" if i % 3 == 1 else "late"
        prefill_count, decode_count = 1 + i % 4, 1 + i // 5 % 4
        how = strategy(rule, lost_last, preempt, placement, ("continuous", "capped", "slack")[i % 5 % 3])
        if grid:
            fleet = [grid_prefill()] * prefill_count, [grid_decode(max_batch=6)] * decode_count
        else:
            fleet = [timed_prefill()] * prefill_count, [timed_decode(max_batch=16)] * decode_count
        outputs = 8 if grid else 20
        cases.append(make(name, how, *fleet, grid=grid, requests=150 + 10 * (i % 11), outputs=outputs))
    return cases


def _kv_pressure() -> list[Case]:
    """KV caches of a few prompts: swap-outs, waits in ready order, prompts larger than the cache."""
    cases = []
    for rule, grid, short in product(("continuous", "capped", "slack"), (False, True), (False, True)):
        name = f"kv-pressure-{rule}-{'short' if short else 'long'}-{'grid' if grid else 'timed'}"
        how = strategy("edf", lost_last=True, preempt=True, decode=rule, h=1.0)
        if grid:
            fleet = (
                [grid_prefill()] * 2,
                [grid_decode(kv=512 if short else 6000), grid_decode(kv=256 if short else 3072)],
            )
        else:
            fleet = [timed_prefill()] * 2, [timed_decode(kv=1500 if short else 15000), timed_decode(kv=9000)]
        cases.append(make(name, how, *fleet, grid=grid, load=0.9, outputs=40, short_prompts=short))
    return cases


def _skipped_steps() -> list[Case]:
    """More residents than a step within h x the tightest target can take."""
    few = [timed_decode(limit=30)]
    few_grid = [grid_decode(limit=9)] * 2
    one, two = [timed_prefill()], [grid_prefill()] * 2
    return [
        make("skipped-steps-h-0.9-timed", strategy("sjf", decode="slack"), one, few, outputs=60),
        make("skipped-steps-h-1-timed", strategy("fcfs", decode="slack", h=1.0), one, [timed_decode()], outputs=40),
        make("skipped-steps-h-0.5-grid", strategy("edf", decode="slack", h=0.5), two, few_grid, grid=True, outputs=6),
        make(
            "skipped-steps-h-1-grid", strategy("fcfs", decode="slack", h=1.0), two, few_grid[:1], grid=True, outputs=8
        ),
        make(
            "skipped-steps-by-context-timed",
            strategy("edf", lost_last=True, decode="slack"),
            [timed_prefill()] * 2,
            [decode(0.02, 0.0004, 5e-7, limit=24)] * 2,
            outputs=30,
        ),
    ]


def _mixed_fleets() -> list[Case]:
    """Instances that differ in speed, chunk and limits, so that a request's remaining seconds depend on who asks."""
    timed = [timed_prefill(1.0, 4096), timed_prefill(2.3, 2048), timed_prefill(0.6, None), timed_prefill(1.4, 8192)]
    grid = [grid_prefill(1.0), grid_prefill(2.0, 512), grid_prefill(0.5, 2048), grid_prefill(1.0, None)]
    decodes = [timed_decode(max_batch=8), timed_decode(1.7, max_batch=12), timed_decode(0.7, kv=20_000)]
    grid_decodes = [grid_decode(max_batch=3), grid_decode(2.0, max_batch=5), grid_decode(0.5, kv=4096)]
    cases = []
    for rule, placement in product(("least-laxity", "edf", "sjf"), ("late", "round-robin")):
        how = strategy(rule, lost_last=True, preempt=True, placement=placement, decode="capped")
        cases.append(make(f"mixed-fleet-{rule}-{placement}-timed", how, timed, decodes, requests=400, outputs=20))
        cases.append(make(f"mixed-fleet-{rule}-{placement}-grid", how, grid, grid_decodes, grid=True, requests=300))
    return cases


def _handover() -> list[Case]:
    """First tokens by decode, transfers that take no time, prompts that need a long one, outputs of one token."""
    timed = [timed_prefill()] * 3, [timed_decode(max_batch=10)] * 2
    grid = [grid_prefill()] * 3, [grid_decode(max_batch=4)] * 2
    slow = {"bytes_per_token": 262144, "bytes_per_s": 2.5e9, "latency_s": 0.01}
    best = strategy("edf", lost_last=True, preempt=True, decode="slack")
    plain = strategy("fcfs", placement="round-robin")
    capped = strategy("urgency", lost_last=True, preempt=True, decode="capped")
    by_decode = {"first_token": "decode", "one_token_share": 0.3}
    return [
        make("first-token-by-decode-slack-timed", best, *timed, **by_decode),  # type: ignore[arg-type]
        make("first-token-by-decode-continuous-timed", plain, *timed, **by_decode),  # type: ignore[arg-type]
        make("first-token-by-decode-capped-grid", capped, *grid, grid=True, **by_decode),  # type: ignore[arg-type]
        make("first-token-by-decode-context-cost-grid", plain, grid[0], [decode(0.25, 2**-4, 2**-14, max_batch=8)] * 2,
             grid=True, **by_decode),  # type: ignore[arg-type]
        make("no-transfer-time-edf-grid", best, *grid, grid=True, transfer=NO_TRANSFER, requests=400),
        make("no-transfer-time-fcfs-grid", plain, *grid, grid=True, transfer=NO_TRANSFER, requests=400),
        make("no-transfer-time-capped-grid", capped, *grid, grid=True, transfer=NO_TRANSFER, requests=400),
        make("slow-transfer-timed", plain, *timed, transfer=slow),
        make("one-token-outputs-timed", best, *timed, one_token_share=1.0),
        make("mostly-one-token-outputs-grid", plain, *grid, grid=True, one_token_share=0.8),
    ]  # fmt: skip


def _limits() -> list[Case]:
    """Batch caps that bind all the time, whole prompts, more attention than linear work, quiet and flooded queues."""
    timed = [timed_prefill()] * 2
    attention = [prefill(0.25, 2**-10, 2**-21, 512)] * 2
    context_cost = [decode(0.25, 2**-4, 2**-14, max_batch=5)] * 2
    return [
        make("batch-cap-2-continuous-timed", strategy("edf"), timed, [timed_decode(max_batch=2)] * 4, outputs=16),
        make("batch-cap-1-continuous-grid", strategy("sjf"), [grid_prefill()],
             [grid_decode(max_batch=1)] * 3, grid=True),
        make("batch-cap-3-capped-grid", strategy("sjf", decode="capped"), [grid_prefill()] * 2,
             [grid_decode(max_batch=3)] * 2, grid=True),
        make("batch-limit-3-slack-timed", strategy("fcfs", decode="slack"), timed, [timed_decode(limit=3)] * 3),
        make("batch-limit-binds-slack-only-timed", strategy("fcfs"), timed, [timed_decode(max_batch=6, limit=9)] * 2),
        make("whole-prompts-timed", strategy("least-laxity", lost_last=True, preempt=True),
             [timed_prefill(chunk_tokens=None)] * 3, [timed_decode()] * 2),
        make("attention-bound-grid", strategy("least-laxity", lost_last=True, preempt=True, decode="capped"),
             attention, context_cost, grid=True, requests=250),
        make("attention-bound-urgency-grid", strategy("urgency", preempt=True, decode="slack", h=1.0),
             attention, context_cost, grid=True, requests=250),
        make("quiet-timed", strategy("aged-sjf", preempt=True, decode="slack"), timed, [timed_decode()] * 2, load=0.4),
        make("flooded-timed", strategy("edf", lost_last=True, preempt=True), timed, [timed_decode()] * 2, load=2.5),
        make("flooded-aged-sjf-grid", strategy("aged-sjf", lost_last=True, preempt=True), [grid_prefill()] * 4,
             [grid_decode()] * 4, grid=True, load=2.5, requests=300),
    ]  # fmt: skip


CASES: list[Case] = [
    *_every_rule(),
    *_kv_pressure(),
    *_skipped_steps(),
    *_mixed_fleets(),
    *_handover(),
    *_limits(),
]


def by_name(name: str) -> Case:
    """One of `CASES`."""
    return next(case for case in CASES if case.name == name)
