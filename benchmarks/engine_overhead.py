"""What the vLLM plugin costs a step, with 10, 100 and 1,000 requests waiting.

    python benchmarks/engine_overhead.py

In vLLM's own scheduler with made-up model outputs: in every step one prompt of 100 tokens starts, one request ends and
one arrives, beside 8 or 64 that decode, so that the queue keeps its length and every part of the view changes; about
half of the waiting ones can be on time. Stock and plugin take turns in blocks of steps; a step is the arrival,
`schedule` and `update_from_output`, in processor time of the engine's thread: what else runs on the machine does not
count. Then in a real engine on the CPU with a fixed number of clients, each of which asks again when it is answered:
time in the plugin's hooks over that of a step. Writes results/engine_overhead.json.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import meta

ROOT = Path(__file__).parents[1]
VERSION = "0.32.0"
WAITING = (10, 100, 1_000)
DECODING = (8, 64)
BLOCKS, STEPS = 10, 150
SEATS, SECONDS = 8, 30.0
"""Of the real engine: requests that run, how long it is watched."""


def target_s(number: int, longest_s: float = 27.0) -> float:
    """TTFT targets of which about half of 1,000 waiting prompts can be kept: a prompt takes 14 ms here."""
    return 0.5 + longest_s * (number * 0.6180339887 % 1.0)


def hook_seconds(kairos: Any) -> list[float]:
    """A list that will hold the processor seconds in the plugin's hooks, step by step."""
    steps, spent = [], [0.0]
    for name in ("before_step", "after_schedule", "after_step", "arrived"):

        def timed(*arguments: Any, hook: Any = getattr(kairos, name), name: str = name) -> None:
            started_s = time.thread_time()
            hook(*arguments)
            spent[0] += time.thread_time() - started_s
            if name == "after_step":
                steps.append(spent[0])
                spent[0] = 0.0

        setattr(kairos, name, timed)
    return steps


def inside() -> None:
    """In the engine's Python: print microseconds by case."""
    from alone import Loop, Scheduler, settings
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    rows = []
    for waiting in WAITING:
        for decoding in DECODING:
            settings(tpot_s=None, decision_budget_s=1.0)
            loops = {}
            for name, cls in (("stock", AsyncScheduler), ("plugin", Scheduler)):
                loop = loops[name] = Loop(cls, budget=100 + decoding, blocks=40_000, seqs=decoding + 1)
                for n in range(decoding):
                    loop.add(f"decoding-{n}", 1, 1_000_000 // decoding, kairos_ttft_s=0.5)
                for _ in range(4):
                    loop.step()
                for n in range(waiting):
                    loop.add(f"waiting-{n}", 100, 1, kairos_ttft_s=target_s(n))
            taken = {name: [] for name in loops}
            hooks = hook_seconds(loops["plugin"].kairos)
            number = 0
            for _ in range(BLOCKS):
                for name, loop in loops.items():
                    for _ in range(STEPS):
                        number += 1
                        started_s = time.thread_time()
                        loop.add(f"{name}-{number}", 100, 1, kairos_ttft_s=target_s(number))
                        loop.step()
                        taken[name].append(time.thread_time() - started_s)
            row = {"waiting": waiting, "decoding": decoding}
            for name, seconds in taken.items():
                p50, p99 = np.percentile(np.array(seconds) * 1e6, (50, 99))
                row[f"{name}_us"] = {"p50": float(p50), "p99": float(p99)}
            p50, p99 = np.percentile(np.array(hooks[-BLOCKS * STEPS :]) * 1e6, (50, 99))
            row["hooks_us"] = {"p50": float(p50), "p99": float(p99)}
            row["added_us"] = row["plugin_us"]["p50"] - row["stock_us"]["p50"]
            row["queue_kept"] = [len(loop.scheduler.waiting) for loop in loops.values()]
            row["fallbacks"] = loops["plugin"].kairos.planner.validity.fallbacks.total()
            rows.append(row)
    print(json.dumps(rows))


def real(waiting: int) -> dict[str, float]:
    """A real engine with so many waiting."""
    from engine.engines import prompt_of, serve

    async def crowd(engine: Any) -> dict[str, float]:
        async with engine.client() as client:

            async def ask_again(number: int) -> None:
                targets = {"kairos_ttft_s": target_s(number, 0.3 * waiting)}  # a request takes about 0.15 s
                while True:
                    await engine.ask(client, prompt_of(40, number), 60, vllm_xargs=targets)

            asking = [asyncio.create_task(ask_again(n)) for n in range(waiting + SEATS)]
            await asyncio.sleep(SECONDS)
            status = await asyncio.to_thread(engine.status)
            found = await asyncio.to_thread(engine.metric, "vllm:num_requests_waiting")
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        p50_s, p99_s, step_s = status.overhead_p50_s, status.overhead_p99_s, status.step_p50_s
        if p50_s is None or p99_s is None or step_s is None:
            raise RuntimeError("the engine ran no steps")
        return {
            "waiting": found,
            "steps": status.steps,
            "fallbacks": sum(status.fallbacks.values()),
            "hooks_p50_us": p50_s * 1e6,
            "hooks_p99_us": p99_s * 1e6,
            "step_p50_ms": step_s * 1e3,
            "share": p50_s / step_s,
        }

    with tempfile.TemporaryDirectory() as folder, serve(VERSION, Path(folder)) as engine:
        return asyncio.run(crowd(engine))


def main() -> None:
    """Measure, print, write."""
    sys.path.insert(0, str(ROOT / "tests"))
    from engine.engines import python_of

    environment = {k: v for k, v in os.environ.items() if not k.startswith("KAIROS_ENGINE_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "engine" / "inside"), str(ROOT / "benchmarks")])
    ended = subprocess.run(
        [python_of(VERSION), __file__, "--inside"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    rows = json.loads(ended.stdout.splitlines()[-1])
    for row in rows:
        print(
            f"{row['waiting']:5} waiting, {row['decoding']:2} decoding: stock {row['stock_us']['p50']:5.0f} us, plugin "
            f"{row['plugin_us']['p50']:5.0f} us (p99 {row['plugin_us']['p99']:5.0f}); in the hooks "
            f"{row['hooks_us']['p50']:4.0f} us, p99 {row['hooks_us']['p99']:4.0f} (goal at 1,000: 500, 1,200)"
        )
    busy = [real(waiting) for waiting in WAITING]
    for row in busy:
        print(
            f"real engine, {row['waiting']:.0f} waiting: {row['hooks_p50_us']:.0f} us of a step of "
            f"{row['step_p50_ms']:.1f} ms, {100 * row['share']:.1f} % (goal 5 %)"
        )
    results = {"meta": meta("python benchmarks/engine_overhead.py"), "vllm": VERSION, "alone": rows, "real": busy}
    (Path(__file__).parent / "results" / "engine_overhead.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    inside() if "--inside" in sys.argv else main()
