"""The plugin in a real vLLM on the CPU, beside the same vLLM without it."""

import asyncio
import json
import os
import random
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine.engines import (
    ENGINES,
    ROOT,
    VERSIONS,
    Engine,
    Outcome,
    free_port,
    joined,
    prompt_of,
    python_of,
    run,
    serve,
)
from serving import served

pytestmark = pytest.mark.engine

REQUESTS = 500
AT_ONCE = 48


@dataclass
class Asked:
    """One request of the load."""

    prompt: Sequence[int]
    output: int
    targets: Mapping[str, float]
    hang_up_after: int | None
    """The client goes away after so many tokens; None: it stays."""


def load() -> list[Asked]:
    """500 requests of mixed lengths and targets; one in ten is left by its client."""
    chance = random.Random(6)
    asked = []
    for n in range(REQUESTS):
        output = chance.choice((1, 4, 8, 24))
        leaves = output > 4 and chance.random() < 0.2
        targets = {
            "kairos_ttft_s": chance.choice((0.5, 3.0, 20.0)),
            "kairos_tpot_s": chance.choice((0.03, 0.1, 1.0)),
        }
        prompt = prompt_of(chance.choice((5, 20, 60, 150, 700)), n)
        asked.append(Asked(prompt, output, targets, 2 if leaves else None))
    return asked


async def all_of(engine: Engine, asked: Sequence[Asked], leave: bool) -> list[Outcome]:
    """What comes of the requests, with 48 at once."""
    free = asyncio.Semaphore(AT_ONCE)
    async with engine.client() as client:

        async def one(request: Asked) -> Outcome:
            async with free:
                return await engine.ask(
                    client,
                    request.prompt,
                    request.output,
                    request.hang_up_after if leave else None,
                    vllm_xargs=dict(request.targets),
                )

        return list(await asyncio.gather(*(one(request) for request in asked)))


@dataclass
class Served:
    """An engine with the plugin, its control plane, and what stock vLLM made of the load."""

    engine: Engine
    database: Path
    stock: list[Outcome]


@pytest.fixture(scope="module", params=VERSIONS)
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    with serve(request.param, folder, plugin=False, name="stock") as stock:
        expected = run(all_of(stock, load(), leave=False))
    database = folder / "kairos.db"
    with ExitStack() as stack:
        environment = {**os.environ, "KAIROS_STORE__URL": f"sqlite:///{database}"}
        address, _ = stack.enter_context(served(environment))
        engine = stack.enter_context(serve(request.param, folder, control_plane=address))
        yield Served(engine, database, expected)


def test_500_requests_with_clients_that_leave_get_the_tokens_of_stock_vllm(vllm: Served) -> None:
    asked = load()

    got = run(all_of(vllm.engine, asked, leave=True))

    assert [o.error for o in got if o.error] == []
    stayed = [n for n, request in enumerate(asked) if request.hang_up_after is None]
    assert len(stayed) < REQUESTS - 20
    assert [len(got[n].token_ids) for n in stayed] == [asked[n].output for n in stayed]
    assert [n for n in stayed if got[n].token_ids != vllm.stock[n].token_ids] == []
    assert all(vllm.stock[n].token_ids[:2] == got[n].token_ids[:2] for n in range(REQUESTS))


def test_the_engine_is_healthy_and_empty_afterwards(vllm: Served) -> None:
    status = vllm.engine.status()

    assert vllm.engine.is_healthy()
    assert vllm.engine.metric("vllm:num_requests_running") == 0
    assert vllm.engine.metric("vllm:num_requests_waiting") == 0
    assert vllm.engine.metric("vllm:kv_cache_usage_perc") == 0
    assert [name for name in status.counts if name.startswith("failed")] == []
    assert status.tested


def test_short_prompts_overtake_long_ones_that_wait(vllm: Served) -> None:
    async def ask() -> tuple[list[Outcome], list[Outcome]]:
        async with vllm.engine.client() as client:

            def of(tokens: int, seed: int, ttft_s: float) -> "asyncio.Task[Outcome]":
                targets = {"kairos_ttft_s": ttft_s}
                return asyncio.create_task(
                    vllm.engine.ask(client, prompt_of(tokens, seed), 2, vllm_xargs=targets),
                )

            long = [of(6000, 1000 + n, 600.0) for n in range(4)]
            await vllm.engine.holds(client, running=1, waiting=3)
            short = [of(40, 2000 + n, 60.0) for n in range(6)]
            return list(await asyncio.gather(*long)), list(await asyncio.gather(*short))

    long, short = run(ask())

    assert max(o.first_token_s for o in short) < min(o.first_token_s for o in long)


def test_a_long_prompt_yields_at_a_chunk_end_and_goes_on_without_computing_anything_twice(vllm: Served) -> None:
    stored = stored_by(vllm)
    before = vllm.engine.status().counts.get("yielded prompts", 0)
    preempted = vllm.engine.metric("vllm:num_preemptions_total")
    long, urgent = prompt_of(8000, 77), prompt_of(600, 78)

    async def ask() -> tuple[Outcome, Outcome]:
        async with vllm.engine.client() as client:
            targets = {"kairos_ttft_s": 600.0}
            first = asyncio.create_task(vllm.engine.ask(client, long, 2, vllm_xargs=targets))
            await vllm.engine.holds(client, running=1, waiting=0)
            second = await vllm.engine.ask(client, urgent, 2, vllm_xargs={"kairos_ttft_s": 60.0})
            return await first, second

    slow, fast = run(ask())
    status = vllm.engine.status()

    assert fast.first_token_s < slow.first_token_s
    assert status.counts["yielded prompts"] > before
    assert vllm.engine.metric("vllm:num_preemptions_total") == preempted
    assert stored_by(vllm)[1] - stored[1] == len(long) + len(urgent)


def test_every_step_reaches_the_store_of_the_control_plane(vllm: Served) -> None:
    steps, _ = stored_by(vllm)
    exchanged = vllm.engine.status().exchanged

    assert exchanged["pushed steps"] == steps > REQUESTS / 8
    assert exchanged.get("dropped steps", 0) == 0


def stored_by(vllm: Served) -> tuple[int, int]:
    """Steps in the store, and the prompt tokens in them, once all that the engine ran is there."""
    known: dict[str, int] = {}
    while (seen := dict(vllm.engine.status().exchanged)) != known:
        known = seen  # until an exchange had nothing to send, and did not fail
    with sqlite3.connect(f"file:{vllm.database}?mode=ro", uri=True) as connection:
        count, tokens = connection.execute("select count(*), coalesce(sum(new_tokens), 0) from steps").fetchone()
    return int(count), int(tokens)


def test_a_policy_that_raises_invents_and_stalls_stops_nothing(tmp_path: Path) -> None:
    strategy = "engine.unreliable:Unreliable+late+headroom+continuous"
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    asked = load()[:60]

    with serve(VERSIONS[-1], tmp_path, strategy=strategy, environment=paths) as engine:
        got = run(all_of(engine, asked, leave=False))
        status = engine.status()

        assert engine.is_healthy()

    assert [len(o.token_ids) for o in got] == [request.output for request in asked]
    assert set(status.fallbacks) == {
        "Unreliable: RuntimeError",
        "Unreliable: PolicyError",
        "Unreliable: DecisionTimeout",
    }


async def through(prefill: Engine, decode: Engine, asked: Sequence[Asked]) -> list[Outcome]:
    """What comes of the requests when one engine computes their prompts and another one goes on."""
    async with prefill.client() as first, decode.client() as second:

        async def one(request: Asked) -> Outcome:
            body = {"model": "small", "prompt": list(request.prompt), "max_tokens": 1, "temperature": 0}
            body |= {"vllm_xargs": dict(request.targets)}
            body |= {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
            answer = (await first.post("/v1/completions", json=body)).json()
            moved = answer["kv_transfer_params"]
            return await decode.ask(
                second, request.prompt, request.output, vllm_xargs=dict(request.targets), kv_transfer_params=moved
            )

        return list(await asyncio.gather(*(one(request) for request in asked)))


def test_a_prefill_and_a_decode_engine_give_the_tokens_of_one(tmp_path: Path) -> None:
    version, lengths = VERSIONS[-1], (100, 40, 300, 60) * 5 + (700, 2000) * 2  # short ones come faster than they decode
    targets = {"kairos_tpot_s": 0.016}  # four at once keep it
    asked = [Asked(prompt_of(tokens, 500 + n), 130, targets, None) for n, tokens in enumerate(lengths)]
    with serve(version, tmp_path, plugin=False, name="one") as one:
        expected = run(all_of(one, asked, leave=False))

    with (  # a lease that does not end on a slow machine: what is not fetched and given back is seen below
        joined(version, tmp_path, "kv_producer", lease_s=600) as prefill,
        joined(version, tmp_path, "kv_consumer", lease_s=600) as decode,
    ):
        got = run(through(prefill, decode, asked))
        before, behind = prefill.status(), decode.status()

        assert [o.error for o in got if o.error] == []
        assert [o.token_ids for o in got] == [o.token_ids for o in expected]
        assert before.counts["prefill policy"] > 0
        assert behind.counts["admissions held"] > 0
        assert behind.counts.get("prefill policy", 0) == 0
        assert [name for name in {**before.counts, **behind.counts} if name.startswith("failed")] == []
        for engine in (prefill, decode):
            assert engine.is_healthy()
            assert engine.metric("vllm:nixl_num_kv_expired_reqs_total") == 0
            assert engine.metric("vllm:kv_cache_usage_perc") == 0


def test_dynamos_own_code_reads_the_forward_passes(tmp_path: Path) -> None:
    version, port = VERSIONS[-1], free_port()
    source = ENGINES / "sources-dynamo-1.6.1"
    if not source.exists():
        subprocess.run([ROOT / "tests" / "engine" / "sources", "ai-dynamo", "1.6.1", source], check=True)
    listen = [python_of(version), ROOT / "tests" / "engine" / "inside" / "forward_passes.py", str(port)]
    listen += [source / "dynamo" / "common" / "forward_pass_metrics.py", "4"]
    environment = {"DYN_FORWARDPASS_METRIC_PORT": str(port), "DYN_FPM_WORKER_ID": "worker-7"}

    with serve(version, tmp_path, environment=environment) as engine:
        listener = subprocess.Popen(listen, stdout=subprocess.PIPE, text=True)
        assert listener.stdout is not None
        for line in listener.stdout:
            if line == "idle\n":
                break  # it is heard
        run(all_of(engine, [Asked(prompt_of(700, 1), 3, {}, None)], leave=False))
        told = [json.loads(line) for line in listener.stdout if line != "idle\n"]
        listener.wait(10)

    assert [m["scheduled_requests"]["sum_prefill_tokens"] for m in told] == [512, 188, 0, 0]
    assert [m["scheduled_requests"]["sum_prefill_kv_tokens"] for m in told] == [0, 512, 0, 0]
    assert [m["scheduled_requests"]["sum_decode_kv_tokens"] for m in told] == [0, 0, 700, 701]
    assert {(m["worker_id"], m["dp_rank"], m["version"], m["topic"]) for m in told} == {("worker-7", 0, 1, "")}
    assert all(m["counter_id"] == m["frame"] and m["wall_time"] > 0 for m in told)
