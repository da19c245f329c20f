"""First come, first served against on-time on a prefill/decode pair behind the gateway, on two cores.

    python benchmarks/pair_attainment.py vllm|torch [--pairs 5]

Long and short prompts with TTFT targets by length, sent at a share of the rate that the pair was measured to take just
before. One gateway, one prefill and one decode engine serve all of it, each engine pinned to a core; the control plane
switches the strategy between runs: A B B A is a pair, A first come, first served. With stock vLLM (NIXL between its
engines) the gateway alone decides, with torch workers the same policies run in them too. Step times come from `kairos
profile` and `kairos train` on the same engines. A pair gives one difference of attainments, the interval is Student's
over the pairs; a pair in which the generator sent late (20 ms at p99) is void and repeated. Writes
results/pair_attainment.json, which keeps what it says of the other engine.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import yaml
from engine_attainment import TTFT, VERSION, Asked, compared, control_plane, drawn, replay, scored
from record import meta

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from command_line import kairos_apart
from engine.engines import Engine, joined
from gateways import free_ports, process, wait_for

from kairos.adapters.embedded.status import read_all
from kairos.adapters.telemetry_files import read_telemetry
from kairos.scheduler_core.strategy import parse_strategy

SIDES = {"fcfs": "fcfs+late+least-requests+continuous", "on-time": "on-time+late+headroom+envelope"}
LOAD = 0.85
SECONDS = 20.0
CROWD = 30
"""Requests at once by which the rate is measured."""
LATEST_S = 0.02
"""A generator that is later than this at p99 makes its run void."""
SWITCH_S = 60.0
PREFILL_CORE, DECODE_CORE = 0, 1
RESULTS = Path(__file__).parent / "results" / "pair_attainment.json"
URGENT = 5
"""By so much less nice are the gateway and the generator, which share a core with the decode worker."""


class Pair(Engine):
    """The gateway in front of the pair."""

    @asynccontextmanager
    async def client(self) -> Any:
        """A client that tells the gateway the targets that its requests tell the engine."""

        async def tell(request: httpx.Request) -> None:
            told = json.loads(request.content)["vllm_xargs"]
            request.headers.update({f"x-kairos-{of}-s": str(told[f"kairos_{of}_s"]) for of in ("ttft", "tpot")})

        async with super().client() as client:
            client.event_hooks = {"request": [tell]}
            yield client

    def is_under(self, strategy: str) -> bool:
        """Whether gateway and workers all have this strategy."""
        metrics = httpx.get(f"{self.url}/metrics", trust_env=False).text
        workers = [status.strategy for status in read_all(self.status_folder)]
        return f'kairos_gateway_strategy{{strategy="{strategy}' in metrics and all(
            told.startswith(strategy) for told in workers
        )


@contextmanager
def on(core: int, more_urgent: int = 0) -> Iterator[None]:
    """What is started inside runs on this core alone, with a niceness lower by so much."""
    cores, niceness = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    os.sched_setaffinity(0, {core})
    os.setpriority(os.PRIO_PROCESS, 0, niceness - more_urgent)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
        os.sched_setaffinity(0, cores)


def fleet(folder: Path, prefill: int, decode: int, gateway: int, plane: str, **prefill_group: Any) -> dict[str, Any]:
    """What the gateway is told."""
    profile = msgspec.structs.asdict(read_telemetry([folder / "profile"]).steps[0].profile)
    both = {"profile": "pair", "engine": "vllm"}
    return {
        "profiles": {"pair": profile | {"step_times": {"model": "model.kairos"}}},
        "fleet": {
            "prefill": [both | {"url": f"http://127.0.0.1:{prefill}", "chunk_tokens": 512} | prefill_group],
            "decode": [both | {"url": f"http://127.0.0.1:{decode}"}],
        },
        "gateway": {"port": gateway, "control_plane": {"url": plane}},
    }


def learn(folder: Path, *measure: object) -> None:
    """Measure step times and train a model of them."""
    print(kairos_apart("profile", *measure, "--out", "profile", cwd=folder))
    print(kairos_apart("train", "profile", "--out", "model.kairos", cwd=folder), flush=True)


@contextmanager
def torch_pair(folder: Path, plane: str) -> Iterator[dict[str, Any]]:
    """Torch workers, which order prompts and form batches themselves."""
    with on(PREFILL_CORE):
        sweep = ("--batches", "1,2,4,8,16", "--contexts", "0,256,1024,3072", "--repeats", 2)
        learn(folder, "torch", "--model", "small", *sweep)
    os.environ |= {
        "KAIROS_ENGINE_MODEL": str(folder / "model.kairos"),
        "KAIROS_ENGINE_STATUS_DIR": str(folder / "status"),
    }
    prefill, decode, gateway = free_ports(3)
    with ExitStack() as stack:
        for role, port, core in (("prefill", prefill, PREFILL_CORE), ("decode", decode, DECODE_CORE)):
            with on(core):
                asked = ("--role", role, "--port", port, "--slot-tokens", 4096, "--control-plane", plane)
                stack.enter_context(process("worker", "torch", "--model", "small", *asked))
        yield fleet(folder, prefill, decode, gateway, plane, in_flight=16)


@contextmanager
def vllm_pair(folder: Path, plane: str) -> Iterator[dict[str, Any]]:
    """Stock vLLM engines: first come, first served inside, so prompts wait in the gateway."""
    with ExitStack() as stack:
        with on(PREFILL_CORE):
            prefill = stack.enter_context(joined(VERSION, folder, "kv_producer", plugin=False))
        with on(DECODE_CORE):
            decode = stack.enter_context(joined(VERSION, folder, "kv_consumer", plugin=False))
        sweep = ("--prompts", "16,64,128,256,512,1024,2048,3000", "--batches", "1,2,4,8", "--contexts", "64,512")
        told = ("--model", "small", "--gpu", "cpu", "--chunk-tokens", 512, "--repeats", 3)
        learn(folder, "engine", prefill.url, *told, *sweep)
        (gateway,) = free_ports(1)
        yield fleet(folder, httpx.URL(prefill.url).port, httpx.URL(decode.url).port, gateway, plane)


ENGINES = {"vllm": vllm_pair, "torch": torch_pair}


@contextmanager
def served(engine: str, folder: Path, plane: str) -> Iterator[Pair]:
    """The pair behind a gateway, with step times that were measured and learned just before."""
    with ENGINES[engine](folder, plane) as configuration:
        (folder / "kairos.yaml").write_text(yaml.safe_dump(configuration))
        with on(DECODE_CORE, URGENT), process("gateway", "--config", folder / "kairos.yaml") as started:
            url = f"http://127.0.0.1:{configuration['gateway']['port']}"
            wait_for(f"{url}/health")
            yield Pair(url, started, folder / "status")


def switch(pair: Pair, answers: dict[str, bytes], side: str, generation: int) -> None:
    """Have the control plane name a strategy, and wait until it is in force everywhere."""
    strategy = parse_strategy(SIDES[side])
    told = {"name": side, "text": strategy.text, "version": 1, "generation": generation}
    told["policies"] = {kind: {"name": of.name, "params": of.parameters} for kind, of in strategy.choices()}
    answers["/strategies/active"] = msgspec.json.encode(told)
    ends_s = time.monotonic() + SWITCH_S
    while not pair.is_under(side):
        if time.monotonic() > ends_s:
            raise TimeoutError(f"{side} is not in force after {SWITCH_S:.0f} s")
        asyncio.run(replay(pair, [Asked(0.0, 20, 4, TTFT[0])], 710))  # an idle engine takes nothing up
        time.sleep(0.5)


def run_pair(pair: Pair, answers: dict[str, bytes], number: int, tries: int) -> list[dict[str, Any]]:
    """A B B A at a rate that is measured first."""
    seed = 800 + 10 * number
    switch(pair, answers, "fcfs", 10 * tries)
    taken = asyncio.run(replay(pair, drawn(TTFT, CROWD, 1e9, seed), seed))
    per_s = LOAD * CROWD / taken.seconds
    runs = []
    for place, side in enumerate(("fcfs", "on-time", "on-time", "fcfs")):
        switch(pair, answers, side, 10 * tries + 1 + place)
        seed = 10 * number + place // 2  # each half of a pair sends the same requests
        asked = drawn(TTFT, max(20, round(per_s * SECONDS)), per_s, seed)
        seen = asyncio.run(replay(pair, asked, seed))
        lag_p50_s, lag_p99_s = map(float, np.percentile(seen.lags_s, (50, 99)))
        run = {"pair": number, "side": side, "per_s": per_s, "seconds": seen.seconds}
        runs.append(run | {"lag_p50_s": lag_p50_s, "lag_p99_s": lag_p99_s} | scored(asked, seen.outcomes))
        print(
            f"{side:8} ttft {runs[-1]['ttft']:.2f}, {per_s:.2f} a second, {seen.seconds:.0f} s, "
            f"sent {1e3 * lag_p99_s:.0f} ms late at p99",
            flush=True,
        )
    return runs


def main() -> None:
    """Measure, print, write."""
    reading = argparse.ArgumentParser()
    reading.add_argument("engine", choices=ENGINES)
    reading.add_argument("--pairs", type=int, default=5)
    told = reading.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"meta": meta("python benchmarks/pair_attainment.py vllm|torch"), "sides": SIDES, "load": LOAD}
    runs: list[dict[str, Any]] = []
    void = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plane, _, answers = stack.enter_context(control_plane())
        pair = stack.enter_context(served(told.engine, folder, plane))
        stack.enter_context(on(DECODE_CORE, URGENT))
        for tries in range(1, 2 * told.pairs + 1):
            found = run_pair(pair, answers, len(runs) // 4, tries)
            if max(run["lag_p99_s"] for run in found) < LATEST_S:
                runs += found
            else:
                void += 1
            if len(runs) == 4 * told.pairs:
                break
    if not runs:
        raise SystemExit(f"all of {void} pairs are void: the generator was late; use an idle machine")
    results[told.engine] = compared(runs, tuple(SIDES)) | {"void_pairs": void, "seconds": SECONDS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for metric, difference in results[told.engine]["differences"].items():
        level = results[told.engine]["attainment"][metric]
        print(
            f"{metric} met: fcfs {100 * level['fcfs']:.1f} %, on-time {100 * level['on-time']:.1f} %, "
            f"{difference['mean']:+.1f} points ({difference['low']:+.1f} to {difference['high']:+.1f})"
        )


if __name__ == "__main__":
    main()
