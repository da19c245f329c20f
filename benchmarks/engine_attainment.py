"""Stock vLLM against the same vLLM with the plugin: the same requests at the same times, on the CPU.

    python benchmarks/engine_attainment.py [--pairs 5] [--only WORKLOAD]

Both engines run side by side and take turns: A B B A is a pair, A stock. One workload has long and short prompts and
TTFT targets by length, the other two TPOT classes. The rate of a pair is a share of what the stock engine was measured
to take just before it, its TPOT targets are multiples of the pace of that engine when full; the plugin's model is
trained on steps that it reported itself and pulled by it. A pair gives one difference of attainments; the interval is
Student's over the pairs. How late the generator sent its requests is noted too. Writes results/engine_attainment.json.
"""

import argparse
import asyncio
import gzip
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from record import meta
from scipy.stats import t as student

from kairos.predictors.artifact import dump
from kairos.predictors.features import SCHEMA_HASH
from kairos.predictors.training import train
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import FloatArray
from kairos.scheduler_core.telemetry import StepRecord, StepRow, Steps

VERSION = "0.32.0"
SECONDS = 15.0
LOAD = 0.95
CROWD = 30
"""Requests at once by which the rate is measured."""


@dataclass(frozen=True)
class Kind:
    """A kind of request of a workload."""

    share: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    ttft_s: float
    tpot_s: float
    slo_class: str


TTFT = (
    Kind(0.85, (20, 150), (4, 12), 1.0, 1.0, "short"),
    Kind(0.15, (1500, 3000), (4, 12), 10.0, 1.0, "long"),
)
FULL_BATCH = 8
"""Requests that an engine here runs at a time."""


def workloads(full_pace_s: float) -> dict[str, tuple[Kind, Kind]]:
    """The workloads of an engine that needs so long for a token of each request when it is full, prompts included."""
    tight = Kind(0.5, (50, 900), (30, 60), 5.0, 0.75 * full_pace_s, "tight")
    return {"ttft": TTFT, "tpot": (tight, replace(tight, tpot_s=20 * full_pace_s, slo_class="relaxed"))}


RESULTS = Path(__file__).parent / "results" / "engine_attainment.json"


@dataclass(frozen=True)
class Asked:
    """One request of a run."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    kind: Kind


def drawn(kinds: Sequence[Kind], count: int, per_s: float, seed: int) -> list[Asked]:
    """Requests with Poisson arrivals; the same whatever the rate, but for the times."""
    chance = np.random.default_rng(seed)
    at_s = np.cumsum(chance.exponential(1.0, count)) / per_s
    which = chance.choice(len(kinds), count, p=[kind.share for kind in kinds])
    return [
        Asked(float(at), int(chance.integers(*kind.prompt_tokens)), int(chance.integers(*kind.output_tokens)), kind)
        for at, kind in zip(at_s, (kinds[k] for k in which), strict=True)
    ]


class Replayed(NamedTuple):
    """What came of requests."""

    outcomes: list[Any]
    seconds: float
    """From the first request to the last answer."""
    lags_s: FloatArray
    """How much later than planned each was sent."""


async def replay(engine: Any, asked: Sequence[Asked], seed: int) -> Replayed:
    """Send the requests at their times, and wait for all answers."""
    from engine.engines import prompt_of

    lags_s: list[float] = []
    prompts = [prompt_of(request.prompt_tokens, seed * 100_000 + n) for n, request in enumerate(asked)]
    clock = asyncio.get_running_loop()
    async with engine.client() as client:
        started_s = clock.time()

        async def one(request: Asked, prompt: Sequence[int]) -> Any:
            targets = {"kairos_ttft_s": request.kind.ttft_s, "kairos_tpot_s": request.kind.tpot_s}
            await asyncio.sleep(request.at_s - (clock.time() - started_s))
            lags_s.append(clock.time() - started_s - request.at_s)
            return await engine.ask(client, prompt, request.output_tokens, vllm_xargs=targets)

        outcomes = await asyncio.gather(*map(one, asked, prompts))
        return Replayed(list(outcomes), clock.time() - started_s, np.array(lags_s))


def scored(asked: Sequence[Asked], outcomes: Sequence[Any]) -> dict[str, Any]:
    """Attainments of a run; a request that failed has missed."""
    whole = [len(o.token_ids) == a.output_tokens for a, o in zip(asked, outcomes, strict=True)]
    ttft = [w and o.ttft_s <= a.kind.ttft_s for w, a, o in zip(whole, asked, outcomes, strict=True)]
    tpot = [w and o.tpot_s <= a.kind.tpot_s for w, a, o in zip(whole, asked, outcomes, strict=True)]
    of: dict[str, Any] = {"requests": len(asked), "failed": whole.count(False)}
    of |= {"ttft": float(np.mean(ttft)), "tpot": float(np.mean(tpot))}
    for name in sorted({a.kind.slo_class for a in asked}):
        mine = [a.kind.slo_class == name for a in asked]
        of[f"ttft {name}"] = float(np.mean(np.array(ttft)[mine]))
        of[f"tpot {name}"] = float(np.mean(np.array(tpot)[mine]))
        paces_s = [o.tpot_s for o, m in zip(outcomes, mine, strict=True) if m]
        of[f"pace {name}"] = [float(p) for p in np.nanpercentile(paces_s, (50, 90))]
    return of


@contextmanager
def control_plane() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, bytes]]]:
    """A control plane that keeps the steps it is sent in a list, and answers what a mapping holds."""
    rows: list[dict[str, Any]] = []
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = gzip.decompress(self.rfile.read(int(self.headers["content-length"])))
            rows.extend(json.loads(line) for line in body.splitlines())
            self._answer(200, b"{}")

        def do_GET(self) -> None:
            found = answers.get(self.path)
            self._answer(404 if found is None else 200, found or b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", rows, answers
    server.shutdown()


def trained(rows: Sequence[dict[str, Any]]) -> tuple[Profile, bytes, dict[str, Any]]:
    """A model of the rows: its profile, its file, and what it makes of them by kind of step."""
    profile = Profile(**{name: rows[0][name] for name in ("gpu", "model", "precision", "tp", "ep", "engine")})
    records: dict[str, list[StepRecord]] = {}
    for row in rows:
        told = msgspec.convert(row, StepRow)
        records.setdefault(told.step_kind, []).append(
            StepRecord(
                told.step_kind,
                told.latency_ms / 1e3,
                told.n_requests,
                told.new_tokens,
                told.cached_tokens,
                told.batch_size,
                told.sum_context_tokens,
                told.prev_phase,
                told.run,
            )
        )
    learned = list(train([Steps.of(profile, of_kind) for of_kind in records.values()]))
    told = {
        kind: {"rows": len(records[kind]), "line": list(model.line), "held_back_median_ape": model.held_back.median_ape}
        for kind, model in learned[0].models.items()
    }
    return profile, dump(learned), told


def learn(engine: Any, rows: Sequence[dict[str, Any]], answers: dict[str, bytes]) -> dict[str, Any]:
    """Let the plugin report steps of two workloads, train on them, and wait until it has pulled the model."""
    alone = [Asked(0.0, 20 * 3**n, 2, TTFT[0]) for n in range(5)]
    for n, request in enumerate(alone):
        asyncio.run(replay(engine, [request], 700 + n))
    for seed, kinds in enumerate((TTFT, workloads(1.0)["tpot"]), start=900):
        asyncio.run(replay(engine, drawn(kinds, CROWD, 4.0, seed), seed))
    engine.status(), engine.status()  # the thread has sent what there was
    profile, model, told = trained(rows)
    entry = {"profile_id": profile.profile_id, "version": 1, "generation": 1, "schema_hash": SCHEMA_HASH}
    answers[f"/models/{profile.profile_id}/1/artifact"] = model
    answers["/models/serving"] = msgspec.json.encode({"models": [entry]})
    while "model 1" not in engine.status().step_times:
        asyncio.run(replay(engine, alone[:1], 710))  # an idle engine takes nothing up
    return told


def interval(differences: FloatArray) -> dict[str, float]:
    """Mean and 95 % interval of the pairs' differences, in points."""
    points = 100 * differences
    half = float(student.ppf(0.975, len(points) - 1) * points.std(ddof=1) / np.sqrt(len(points)))
    mean = float(points.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def compared(runs: list[dict[str, Any]], sides: tuple[str, str] = ("stock", "plugin")) -> dict[str, Any]:
    """Attainments of both sides, and the second's differences to the first over the pairs that are done."""
    pairs = sorted({run["pair"] for run in runs})
    found: dict[str, Any] = {"runs": runs, "attainment": {}, "differences": {}}
    told = [key for key in runs[0] if key.startswith(("ttft", "tpot"))]
    for metric in [key for key in told if all(key in run for run in runs)]:  # a run may draw no long prompt
        shares = {
            side: [np.mean([r[metric] for r in runs if r["pair"] == pair and r["side"] == side]) for pair in pairs]
            for side in sides
        }
        found["attainment"][metric] = {side: float(np.mean(values)) for side, values in shares.items()}
        if len(pairs) > 1:
            before, after = (np.array(shares[side]) for side in sides)
            found["differences"][metric] = interval(after - before)
    return found


def told_by(engine: Any) -> dict[str, Any]:
    """What the plugin says of itself."""
    status = engine.status()
    return {
        "counts": status.counts,
        "fallbacks": status.fallbacks,
        "overhead_p50_us": (status.overhead_p50_s or 0) * 1e6,
        "step_p50_ms": (status.step_p50_s or 0) * 1e3,
    }


def main() -> None:
    """Measure, print, write."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from engine.engines import serve

    reading = argparse.ArgumentParser()
    reading.add_argument("--pairs", type=int, default=5)
    reading.add_argument("--only", choices=workloads(1.0), help="the file keeps what it says of the others")
    told = reading.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if told.only else {}
    results |= {"meta": meta("python benchmarks/engine_attainment.py"), "vllm": VERSION}
    results |= {"load": LOAD}
    with tempfile.TemporaryDirectory() as at, ExitStack() as stack:
        folder = Path(at)
        address, rows, answers = stack.enter_context(control_plane())
        with ThreadPoolExecutor() as starting:  # a start takes a minute, most of it imports
            stock = starting.submit(stack.enter_context, serve(VERSION, folder, plugin=False, name="stock"))
            plugin = starting.submit(
                stack.enter_context, serve(VERSION, folder, name="plugin", linear=None, control_plane=address)
            )
        engines = {"stock": stock.result(), "plugin": plugin.result()}
        results["model"] = learn(engines["plugin"], rows, answers)
        print(f"{len(rows)} steps: {results['model']}", flush=True)
        for number, name in enumerate(workloads(1.0)):
            if told.only not in (None, name):
                continue
            runs: list[dict[str, Any]] = []
            for pair in range(told.pairs):
                crowd = drawn(workloads(1.0)[name], CROWD, 1e9, 800 + 10 * pair + number)
                taken = asyncio.run(replay(engines["stock"], crowd, 800 + 10 * pair + number))
                per_s = LOAD * CROWD / taken.seconds
                full_pace_s = FULL_BATCH * taken.seconds / sum(request.output_tokens for request in crowd)
                kinds = workloads(full_pace_s)[name]
                for place, side in enumerate(("stock", "plugin", "plugin", "stock")):
                    seed = 10 * pair + place // 2  # each half of a pair replays the same requests
                    asked = drawn(kinds, max(20, round(per_s * SECONDS)), per_s, seed)
                    seen = asyncio.run(replay(engines[side], asked, seed))
                    lag_p50_s, lag_p99_s = map(float, np.percentile(seen.lags_s, (50, 99)))
                    run = {"pair": pair, "side": side, "per_s": per_s, "seconds": seen.seconds}
                    run |= {"full_pace_s": full_pace_s}
                    run |= {"lag_p50_s": lag_p50_s, "lag_p99_s": lag_p99_s} | scored(asked, seen.outcomes)
                    runs.append(run)
                    paces = {k: [round(1e3 * p) for p in v] for k, v in run.items() if k.startswith("pace")}
                    print(
                        f"{name} {side:6} ttft {run['ttft']:.2f} tpot {run['tpot']:.2f}, {per_s:.2f} a second, "
                        f"full {1e3 * full_pace_s:.0f} ms, "
                        f"{seen.seconds:.0f} s, {paces}, sent {1e3 * lag_p99_s:.0f} ms late at p99",
                        flush=True,
                    )
                results[name] = compared(runs) | {"seconds": SECONDS}
                results["plugin"] = told_by(engines["plugin"])
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            for metric, difference in results[name]["differences"].items():
                level = results[name]["attainment"][metric]
                print(
                    f"{name}: {metric} met: stock {100 * level['stock']:.1f} %, plugin {100 * level['plugin']:.1f} %, "
                    f"{difference['mean']:+.1f} points ({difference['low']:+.1f} to {difference['high']:+.1f})"
                )


if __name__ == "__main__":
    main()
