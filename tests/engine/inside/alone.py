"""vLLM's scheduler alone, with the plugin in it: made-up model outputs, a clock of its own, no model and no GPU.

    ENGINE_PYTHON tests/engine/inside/alone.py [SCENARIO ...]

prints one JSON object with what each scenario saw; `test_scheduler_alone.py` makes its claims about it.
"""

import json
import os
import random
import sys
import tempfile
import zlib
from collections import deque
from pathlib import Path
from types import SimpleNamespace

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_TARGET_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm import __version__ as vllm_version
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kairos.adapters.embedded import background
from kairos.adapters.vllm import Scheduler
from kairos.adapters.vllm import scheduler as plugin
from kairos.scheduler_core.policy import PrefillView

BLOCK = 16
PREFILL, DECODE = (0.004, 1e-4, 0.0), (0.008, 2e-4, 2e-8)
"""Coefficients of the made-up step times: a prompt of 2,000 tokens takes 0.2 s, a decode step about 10 ms."""

init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)
folder = tempfile.mkdtemp(prefix="kairos-alone-")
Path(folder, "config.json").write_text(
    json.dumps(
        {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "vocab_size": 512,
            "max_position_embeddings": 8192,
            "word_embed_proj_dim": 64,
            "do_layer_norm_before": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
    )
)
model = ModelConfig(model=folder, tokenizer=folder, dtype="float16", skip_tokenizer_init=True, max_model_len=8192)


class Clock(SimpleNamespace):
    """Stands in for the module `time` of the plugin."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        super().__init__(monotonic=lambda: self.now_s, time=lambda: self.now_s, perf_counter=plugin.time.perf_counter)


real_time = plugin.time


def scheduler(
    cls: type, budget: int = 512, blocks: int = 4000, seqs: int = 16, in_flight: bool = True, block: int = BLOCK
):
    """A scheduler of that class on an engine with `blocks` of KV, `block` tokens each."""
    scheduling = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=8192,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=in_flight,
    )
    cache = CacheConfig(block_size=block, enable_prefix_caching=False)
    config = VllmConfig(
        model_config=model, scheduler_config=scheduling, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    cache.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=block, num_kv_heads=1, head_size=16, dtype=torch.float16)
    kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
    return cls(
        vllm_config=config,
        kv_cache_config=kv,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block,
        hash_block_size=block,
        log_stats=True,
    )


class Loop:
    """An engine core with `depth` steps in flight, as vLLM runs it: 1 synchronous, 2 asynchronous."""

    def __init__(self, cls: type, depth: int = 1, **engine: object) -> None:
        self.clock = plugin.time = Clock()
        self.scheduler = scheduler(cls, in_flight=depth > 1, **engine)
        self.depth = depth
        self.flying: deque = deque()
        self.requests: dict[str, Request] = {}
        self.steps: list[dict[str, int]] = []
        self.first_token_s: dict[str, float] = {}
        self.last_token_s: dict[str, float] = {}
        self.preempted: list[str] = []

    def add(self, name: str, prompt: int, output: int = 4, **xargs: float | str) -> None:
        sampling = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=xargs or None)
        tokens = [3 + zlib.crc32(name.encode()) % 500] * prompt
        request = Request(name, tokens, sampling, None, arrival_time=self.clock.now_s, block_hasher=hasher)
        self.requests[name] = request
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        for _ in range(2):  # vLLM says it twice
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> dict[str, int]:
        """Schedule one step, and end the oldest one in flight when there are enough."""
        output = self.scheduler.schedule()
        sampled = {
            i: [7] if not self.scheduler.requests[i].is_prefill_chunk else [] for i in output.num_scheduled_tokens
        }
        self.flying.append((output, sampled))
        self.steps.append(dict(output.num_scheduled_tokens))
        self.preempted += output.preempted_req_ids or []
        if len(self.flying) >= self.depth:
            self.end()
        return self.steps[-1]

    def end(self) -> None:
        output, sampled = self.flying.popleft()
        prompts = sum(n for i, n in output.num_scheduled_tokens.items() if n > 1)
        decodes = sum(n == 1 for n in output.num_scheduled_tokens.values())
        fixed_s = DECODE[0] if decodes else PREFILL[0] if prompts else 0.001
        self.clock.now_s += fixed_s + PREFILL[1] * prompts + DECODE[1] * decodes
        ids = list(sampled)
        answer = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={i: n for n, i in enumerate(ids)},
            sampled_token_ids=[sampled[i] for i in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        self.scheduler.update_from_output(output, answer)
        for name in ids:
            if sampled[name]:
                self.first_token_s.setdefault(name, self.clock.now_s)
                self.last_token_s[name] = self.clock.now_s

    def run(self, most_steps: int = 20_000) -> bool:
        """Until nothing is left; whether that came."""
        for _ in range(most_steps):
            if not self.scheduler.has_unfinished_requests() and not any(o.num_scheduled_tokens for o, _ in self.flying):
                return True
            self.step()
        return False

    @property
    def kairos(self) -> plugin.Kairos:
        return self.scheduler.kairos

    def counts(self) -> dict[str, int]:
        return dict(self.kairos.planner.counts)

    def outputs(self) -> dict[str, int]:
        return {name: request.num_output_tokens for name, request in self.requests.items()}


def settings(**values: object) -> None:
    """What the plugin is told; its decisions may take as long as a busy machine makes them."""
    for name in [n for n in os.environ if n.startswith("KAIROS_ENGINE_")]:
        del os.environ[name]
    line = {"prefill": dict(zip(("a_s", "b_s", "c_s"), PREFILL, strict=True))}
    line["decode"] = dict(zip(("a_s", "b_s", "c_s"), DECODE, strict=True))
    told = {"linear": line, "status_dir": folder, "decision_budget_s": 30.0, **values}
    os.environ |= {f"KAIROS_ENGINE_{name.upper()}": json.dumps(value) for name, value in told.items()}


EDF = "edf(lost_last=true,preempt=true)+late+headroom+continuous"


def order() -> dict[str, object]:
    """Three prompts, the most urgent came last."""
    settings(strategy=EDF)
    loop = Loop(Scheduler)
    for name, target_s in (("slow", 9.0), ("middle", 2.0), ("urgent", 0.3)):
        loop.add(name, 400, kairos_ttft_s=target_s)
    loop.run()
    return {"first_step": loop.steps[0], "by_first_token": sorted(loop.first_token_s, key=loop.first_token_s.get)}


def overtaking(cls: type = Scheduler) -> dict[str, object]:
    """Six short prompts behind four queued long ones."""
    settings()
    loop = Loop(cls, seqs=4)
    for n in range(4):
        loop.add(f"long-{n}", 4000, kairos_ttft_s=20.0)
    loop.step()
    for n in range(6):
        loop.add(f"short-{n}", 100, kairos_ttft_s=0.5)
    ended = loop.run()
    short = max(s for name, s in loop.first_token_s.items() if name.startswith("short"))
    return {"ended": ended, "last_short_s": short - 1000.0, "last_long_s": max(loop.first_token_s.values()) - 1000.0}


def chunk_yield(depth: int = 1) -> dict[str, object]:
    """A long prompt that runs, and an urgent one that comes."""
    settings()
    loop = Loop(Scheduler, depth)
    loop.add("long", 3000, kairos_ttft_s=20.0)
    loop.step(), loop.step()
    computed = loop.requests["long"].num_computed_tokens
    loop.add("urgent", 900, kairos_ttft_s=0.15)
    before = len(loop.steps)
    loop.step(), loop.step()
    kept = loop.requests["long"].num_computed_tokens
    blocks = len(loop.scheduler.kv_cache_manager.get_block_ids("long")[0])
    ended = loop.run()
    return {
        "ended": ended,
        "computed": computed,
        "kept": kept,
        "kept_blocks": blocks,
        "while_yielding": loop.steps[before : before + 2],
        "prompt_tokens": {i: sum(s.get(i, 0) for s in loop.steps) for i in ("long", "urgent")},
        "preempted": loop.preempted,
        "counts": loop.counts(),
        "outputs": loop.outputs(),
    }


def load(cls: type, depth: int, blocks: int, seed: int = 1, requests: int = 500) -> dict[str, object]:
    """Mixed lengths and targets, some aborted, with little KV."""
    settings()
    loop, chance = Loop(cls, depth, blocks=blocks, budget=1024), random.Random(seed)
    aborted = set()
    for n in range(requests):
        loop.add(
            f"r{n}",
            chance.choice((20, 100, 600, 3000)),
            chance.choice((1, 5, 40)),
            kairos_ttft_s=chance.choice((0.3, 2.0, 10.0)),
            kairos_tpot_s=chance.choice((0.012, 0.05, 0.2)),
        )
        for _ in range(chance.randrange(3)):
            loop.step()
        if chance.random() < 0.1:
            gone = f"r{chance.randrange(n + 1)}"
            if not loop.requests[gone].is_finished():
                aborted.add(gone)
                loop.abort(gone)
    ended = loop.run()
    short = [i for i, r in loop.requests.items() if i not in aborted and r.num_output_tokens != r.max_tokens]
    manager = loop.scheduler.kv_cache_manager
    seen = {
        "ended": ended,
        "aborted": len(aborted),
        "short": short,
        "steps": len(loop.steps),
        "kv_used": manager.usage,
        "preempted": len(loop.preempted),
    }
    if cls is Scheduler:
        mirror = loop.kairos.planner.mirror
        left = (len(loop.kairos.entries), len(mirror.lane.own), len(mirror.residents), len(mirror.begun))
        seen |= {"left_in_view": left, "context_left": mirror.sum_context_tokens, "counts": loop.counts()}
        seen["unfinished_shapes"] = len(loop.kairos._shapes)
    return seen


class Raises:
    """Fails at every decision."""

    def order(self, view: PrefillView) -> list[str]:
        raise RuntimeError("no idea")


class Invents:
    """Names a request that is not there."""

    def order(self, view: PrefillView) -> list[str]:
        return ["nobody"] * view.wanted


class Stalls:
    """Never answers."""

    def order(self, view: PrefillView) -> list[str]:
        while True:
            pass


class Worst:
    """Breaks the contract as badly as it can: it empties what it is shown."""

    def order(self, view: PrefillView) -> list[str]:
        view.waiting.clear()
        return []


def faulty(policy: type, budget_s: float = 30.0) -> dict[str, object]:
    """A policy that fails, beside stock vLLM under the same load."""
    name = f"{policy.__module__}:{policy.__name__}"
    seen = []
    for cls in (Scheduler, AsyncScheduler):
        settings(strategy=f"{name}+late+headroom+continuous", tpot_s=None, decision_budget_s=budget_s)
        loop = Loop(cls)
        for n in range(12):
            loop.add(f"r{n}", 300 + 10 * n)
            loop.step()
        seen.append((loop.run(), loop.steps))
        if cls is Scheduler:
            fallbacks = dict(loop.kairos.planner.decider.validity.fallbacks)
            counts = loop.counts()
    return {"ended": seen[0][0], "as_stock": seen[0][1] == seen[1][1], "fallbacks": fallbacks, "counts": counts}


def broken_view() -> dict[str, object]:
    """Kairos's own view is damaged while it runs."""
    settings()
    loop = Loop(Scheduler)
    for n in range(8):
        loop.add(f"r{n}", 700, 20)
        loop.step()
        if n == 4:
            loop.kairos.planner.mirror.residents.clear()
            loop.kairos.planner.mirror.lane.own.by_deadline.clear()
            loop.kairos.planner.mirror.lane.own.live.clear()
    ended = loop.run()
    return {"ended": ended, "outputs": sorted(set(loop.outputs().values())), "counts": loop.counts()}


def slack(tpot_s: float) -> dict[str, object]:
    """Four decodes and a long prompt beside them."""
    settings(tpot_s=tpot_s)
    loop = Loop(Scheduler, budget=2048)
    for n in range(4):
        loop.add(f"d{n}", 50, 200)
    for _ in range(5):
        loop.step()
    loop.add("long", 6000, 2)
    while "long" not in loop.first_token_s:
        loop.step()
    chunks = [s["long"] for s in loop.steps if s.get("long", 0) > 1]
    decoding = [sum(f"d{n}" in s for n in range(4)) for s in loop.steps if s.get("long", 0) > 1]
    spans = [(loop.requests[f"d{n}"].num_output_tokens, loop.first_token_s[f"d{n}"]) for n in range(4)]
    tpot = [(loop.clock.now_s - first) / (tokens - 1) for tokens, first in spans]
    return {"chunks": chunks, "decoding": decoding, "tpot_s": max(tpot), "counts": loop.counts()}


def two_paces(cls: type, block: int = BLOCK) -> dict[str, float]:
    """Two TPOT classes near capacity, the tight one at 1.5 times a full decode step: shares in time."""
    settings()
    loop, chance = Loop(cls, seqs=8, block=block), random.Random(5)
    arrivals = [loop.clock.now_s]
    for _ in range(299):
        arrivals.append(arrivals[-1] + chance.expovariate(9.0))
    tpot_s = [chance.choice((0.015, 0.3)) for _ in arrivals]
    for n, arrival_s in enumerate(arrivals):
        while loop.clock.now_s < arrival_s and loop.scheduler.has_unfinished_requests():
            loop.step()
        loop.clock.now_s = max(loop.clock.now_s, arrival_s)
        targets = {"kairos_ttft_s": 5.0, "kairos_tpot_s": tpot_s[n]}
        loop.add(f"r{n}", chance.randrange(50, 900), chance.randrange(30, 60), **targets)
    ended = loop.run()
    paces = [
        (loop.last_token_s[name] - loop.first_token_s[name]) / (tokens - 1) for name, tokens in loop.outputs().items()
    ]
    in_time = [pace_s <= target_s for pace_s, target_s in zip(paces, tpot_s, strict=True)]
    ttft_s = [loop.first_token_s[f"r{n}"] - arrival_s for n, arrival_s in enumerate(arrivals)]
    tight = [met for met, target_s in zip(in_time, tpot_s, strict=True) if target_s < 0.1]
    return {
        "ended": ended,
        "tight": sum(tight) / len(tight),
        "relaxed": (sum(in_time) - sum(tight)) / (len(in_time) - len(tight)),
        "ttft": sum(s <= 5.0 for s in ttft_s) / len(ttft_s),
    }


def participation() -> dict[str, object]:
    """Two TPOT classes, more than the tight one lets run together."""
    settings(strategy="on-time+late+headroom+envelope")
    loop = Loop(Scheduler, budget=4096, seqs=64)
    for n in range(8):
        loop.add(f"tight-{n}", 20, 60, kairos_tpot_s=0.0125)
    for n in range(40):
        loop.add(f"relaxed-{n}", 20, 60, kairos_tpot_s=0.1)
    ended = loop.run()
    both = [s for s in loop.steps if any(i.startswith("tight") for i in s) and len(s) > 1 and max(s.values()) == 1]
    relaxed = [sum(i.startswith("relaxed") for i in s) for s in both]
    return {
        "ended": ended,
        "relaxed_beside_tight": sum(relaxed) / len(relaxed),
        "counts": loop.counts(),
        "outputs": sorted(set(loop.outputs().values())),
    }


class Stubborn:
    """Wants the same request first whatever happens."""

    def order(self, view: PrefillView) -> list[str]:
        first = max(view.waiting, key=lambda w: w.prompt_tokens)
        return [w.request_id for w in sorted(view.waiting, key=lambda w: w is not first)][: view.wanted]


def no_room() -> dict[str, object]:
    """The preferred prompt needs KV that running prompts hold."""
    settings(strategy=f"{__name__}:Stubborn(preempt=true)+late+headroom+continuous")
    loop = Loop(Scheduler, blocks=200, seqs=4)
    for n in range(3):
        loop.add(f"half-{n}", 900, 3)
    for _ in range(2):
        loop.step()
    loop.add("huge", 3000, 3)
    return {"ended": loop.run(), "preempted": len(loop.preempted), "counts": loop.counts(), "outputs": loop.outputs()}


def news() -> dict[str, object]:
    """Another strategy and other step times while requests run."""
    from kairos.adapters.control_plane import ControlPlane, NewStepTimes, NewStrategy
    from kairos.scheduler_core.domain import Line, LinearStepTimes
    from kairos.scheduler_core.strategy import parse_strategy

    settings()
    loop = Loop(Scheduler)
    loop.kairos.control_plane = ControlPlane("http://127.0.0.1:9", loop.kairos.profile, "run")
    for n in range(12):
        loop.add(f"r{n}", 600, 30)
        loop.step()
        if n == 5:
            loop.kairos.control_plane.news.append(NewStrategy(parse_strategy(EDF), "theirs"))
        if n == 8:
            times = LinearStepTimes(Line(0.1, 1e-3, 0.0), Line(0.1, 1e-3, 0.0))
            loop.kairos.control_plane.news.append(NewStepTimes(times, "7"))
    waiting = loop.kairos.planner.mirror.lane.own.by_arrival
    slow = min((w.prefill_s / w.remaining_tokens for w in waiting), default=0.0)
    ended = loop.run()
    status = loop.kairos.status()
    return {
        "ended": ended,
        "strategy": status.strategy,
        "step_times": status.step_times,
        "seconds_per_token": slow,
        "outputs": sorted(set(loop.outputs().values())),
        "counts": loop.counts(),
    }


SCENARIOS = {
    "version": lambda: vllm_version,
    "order": order,
    "overtaking": overtaking,
    "overtaking_stock": lambda: overtaking(AsyncScheduler),
    "chunk_yield": chunk_yield,
    "chunk_yield_async": lambda: chunk_yield(2),
    "load": lambda: load(Scheduler, 1, 4000),
    "load_async": lambda: load(Scheduler, 2, 4000),
    "pressure": lambda: load(Scheduler, 1, 260),
    "pressure_async": lambda: load(Scheduler, 2, 260),
    "pressure_stock": lambda: load(AsyncScheduler, 1, 260),
    "raises": lambda: faulty(Raises),
    "invents": lambda: faulty(Invents),
    "stalls": lambda: faulty(Stalls, 0.01),
    "worst": lambda: faulty(Worst),
    "broken_view": broken_view,
    "slack_tight": lambda: slack(0.02),
    "slack_loose": lambda: slack(0.1),
    "slack_none": lambda: slack(1e6),
    "two_paces": lambda: two_paces(Scheduler),
    "two_paces_large_blocks": lambda: two_paces(Scheduler, block=128),
    "two_paces_stock": lambda: two_paces(AsyncScheduler),
    "participation": participation,
    "no_room": no_room,
    "news": news,
}


def main(names: list[str]) -> None:
    """Run scenarios and print what they saw."""
    background.PERIOD_S = 3600.0
    seen = {}
    for name in names or SCENARIOS:
        started_s = real_time.perf_counter()
        try:
            seen[name] = SCENARIOS[name]()
        finally:
            plugin.time = real_time
        print(f"{name}: {real_time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    print(json.dumps(seen))


if __name__ == "__main__":
    sys.modules["alone"] = sys.modules["__main__"]
    main(sys.argv[1:])
