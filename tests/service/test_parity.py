"""The service decides as the simulator does: every decision of a run, asked again from a snapshot."""

from typing import Any

import numpy as np
import pytest
from service.recording import Recorded
from service.snapshots import answered, decode, prefill, scheduler_of, settings_of, snapshot, waits

from kairos.adapters.simulator.fleet import build_fleet
from kairos.adapters.simulator.run import Knobs, Run, StepRow, simulate
from kairos.adapters.simulator.tables import Workload
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.strategy import parse_strategy

CHUNK_TOKENS = 800


def settings(strategies: dict[str, Any], prefill_instances: int, kv_tokens: int) -> Settings:
    return settings_of(
        profiles={
            "even": {
                "gpu": "H100",
                "model": "m",
                "step_times": {
                    "linear": {
                        "prefill": {"a_s": 0.05, "b_s": 1e-3, "c_s": 1e-8},
                        "decode": {"a_s": 0.01, "b_s": 2e-3, "c_s": 1e-6},
                    }
                },
            }
        },
        fleet={
            "prefill": [
                {
                    "count": prefill_instances,
                    "profile": "even",
                    "chunk_tokens": CHUNK_TOKENS,
                    "max_requests_per_step": 4,
                }
            ],
            "decode": [{"profile": "even", "max_batch": 8, "kv_tokens": kv_tokens}],
        },
        guards={"deferred_share": 0},
        strategies=strategies,
    )


def workload(requests: int, longest_prompt: int) -> Workload:
    """More than the fleet can do in time, in 25 seconds."""
    rng = np.random.default_rng(5)
    return Workload(
        "made",
        list(range(requests)),
        np.sort(rng.uniform(0, 25, requests)),
        rng.integers(50, longest_prompt, requests),
        rng.integers(20, 180, requests),
        rng.choice([2.0, 6.0], requests),
        rng.choice([0.02, 0.06], requests),
        ["default"] * requests,
        [""] * requests,
        [""] * requests,
    )


def prefill_snapshot(w: Workload, run: Run, now_s: float, binds: bool, instances: int) -> dict[str, Any]:
    """What a router would have told at `now_s`, just before the instances that start a step then decide."""
    begun = [s for s in run.steps if s.kind == "prefill" and s.start_s < now_s]
    computed: dict[int, int] = {}
    for step in (s for s in begun if s.end_s <= now_s):
        for row, tokens in zip(step.request_ids, step.tokens, strict=True):
            computed[row] = computed.get(row, 0) + tokens
    in_flight = {s.instance: s for s in begun if s.end_s > now_s}
    fleet = [
        prefill(
            f"prefill-{n}",
            chunk_tokens=CHUNK_TOKENS,
            max_requests_per_step=4,
            free_in_s=in_flight[n].end_s - now_s if n in in_flight else 0.0,
        )
        for n in range(instances)
    ]

    def told(row: int) -> dict[str, Any]:
        return waits(
            row,
            int(w.prompt_tokens[row]),
            float(w.arrival_s[row]),
            prefilled_tokens=computed.get(row, 0),
            ttft_target_s=float(w.ttft_target_s[row]),
        )

    running = [
        told(row) | {"instance_id": f"prefill-{n}", "step_tokens": tokens}
        for n, step in in_flight.items()
        for row, tokens in zip(step.request_ids, step.tokens, strict=True)
    ]
    moving = {entry["request_id"] for entry in running}
    waiting = []
    for row in range(len(w)):
        if w.arrival_s[row] <= now_s and row not in moving and computed.get(row, 0) < w.prompt_tokens[row]:
            bound = binds or row in computed
            home = {"instance_id": f"prefill-{run.requests.prefill_instance[row]}"} if bound else {}
            waiting.append(told(row) | home)
    return snapshot(*fleet, running=running, waiting=waiting) | {"now_s": now_s}


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize(
    ("rule", "placement"),
    [
        ("fcfs", "round-robin"),
        ("sjf", "late"),
        ("edf(lost_last=true,preempt=true)", "late"),
        ("urgency(preempt=true)", "late"),
        ("on-time", "late"),
        ("on-time", "round-robin"),
        ("service.recording:LongestFirst", "late"),
    ],
)
def test_every_prefill_step_of_a_run_is_what_the_service_starts(rule: str, placement: str, instances: int) -> None:
    text = f"{rule}+{placement}+least-requests+continuous"
    chosen = parse_strategy(text)
    slots = {"prefill": {"name": chosen.prefill.name} | chosen.prefill.parameters, "prefill_placement": placement}
    slots |= {"decode_placement": "least-requests", "decode": "continuous"}
    configured = settings({"chosen": slots}, instances, 10**6)
    w = workload(40 * instances, 2_500)
    run = simulate(w, build_fleet(configured, step_times_of), chosen, Knobs(deferred_share=0.0, stages="prefill"))
    scheduler = scheduler_of(configured)
    by_start: dict[float, list[StepRow]] = {}
    for step in run.steps:
        by_start.setdefault(step.start_s, []).append(step)

    for now_s, steps in by_start.items():
        body = prefill_snapshot(w, run, now_s, placement != "late", instances) | {"strategy": "chosen"}
        answer = answered(body, scheduler=scheduler)

        started = {f"prefill-{step.instance}": list(zip(step.request_ids, step.tokens, strict=True)) for step in steps}
        said: dict[str, list[tuple[int, int]]] = {}
        for entry in sorted(answer["prefill"], key=lambda entry: entry["order"]):
            if entry["step_tokens"]:
                said.setdefault(entry["instance_id"], []).append((entry["request_id"], entry["step_tokens"]))
        assert said == started, f"at {now_s} s"


@pytest.mark.parametrize(
    ("policy", "kv_tokens"),
    [
        ("continuous", 1_500),
        ("capped", 10**6),
        ("slack", 10**6),
        ("slack", 1_500),
        ("envelope", 10**6),
        ("envelope", 1_500),
    ],
)
def test_every_decode_step_of_a_run_is_what_the_service_steps(policy: str, kv_tokens: int) -> None:
    slots = {"prefill": "fcfs", "prefill_placement": "late", "decode_placement": "least-requests", "decode": policy}
    configured = settings({"chosen": slots}, 2, kv_tokens)
    recorded = parse_strategy(f"fcfs+late+least-requests+service.recording:Recorded(policy={policy})")
    Recorded.seen.clear()
    simulate(workload(80, 300), build_fleet(configured, step_times_of), recorded, Knobs(deferred_share=0.0))
    scheduler = scheduler_of(configured)
    state = None

    for view, residents, ready, plan in Recorded.seen:
        lists = {
            name: [
                {
                    "request_id": r.request_id,
                    "instance_id": "decode-0",
                    "context_tokens": r.context_tokens,
                    "output_tokens": r.output_tokens,
                    "first_token_s": r.first_token_s,
                    "last_token_s": r.last_token_s,
                    "tpot_target_s": r.tpot_target_s,
                }
                | ({"ready_s": r.ready_s} if name == "transferred" else {})
                for r in requests
            ]
            for name, requests in (("resident", residents), ("transferred", ready))
        }
        body = snapshot(decode(max_batch=8, kv_tokens=kv_tokens), strategy="chosen", state=state, **lists)
        answer = answered(body | {"now_s": view.now_s}, scheduler=scheduler)

        state = answer["state"]
        step = answer["decode"][0]
        assert (set(step["swap_out"]), step["admit"]) == (set(plan.swap_out), list(plan.admit))
        present = {r.request_id for r in residents} - set(plan.swap_out) | set(plan.admit)
        assert set(step["step"]) == (present if plan.step is None else set(plan.step))
    assert len(Recorded.seen) > 100
