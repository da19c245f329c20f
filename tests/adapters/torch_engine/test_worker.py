"""A torch worker says what its model says, alone or as a pair, whatever the policies decide."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'kairos-scheduler[torch]'")

from command_line import kairos
from emulated import call, events, run, until
from gateways import process, running_gateway, settings_for, wait_for
from torches import plainly, prompt_of, torch_options, torch_workers

from kairos.adapters.control_plane import NewStrategy
from kairos.adapters.http_client import HttpPool
from kairos.adapters.telemetry_files import read_telemetry
from kairos.adapters.torch_engine.process import TorchOptions
from kairos.scheduler_core.strategy import parse_strategy
from kairos.scheduler_core.telemetry import StepRecord

PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
PROMPTS = [1, 2, 15, 64, 65, 300, 700]
"""Below, at and above the tokens of a step."""


def completion(prompt: object, **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 8, "return_token_ids": True} | changes


async def told_by(address: str, prompt: list[int], **changes: Any) -> list[int]:
    """The output tokens, streamed or not."""
    status, body = await call(address, "/v1/completions", completion(prompt, **changes))
    assert status == 200, body
    if not changes.get("stream"):
        ids: list[int] = json.loads(body)["choices"][0]["token_ids"]
        return ids
    return [token for event in events(body)[:-1] for token in event["choices"][0]["token_ids"]]


def pair(folder: Path, **changes: Any) -> tuple[TorchOptions, TorchOptions]:
    return tuple(torch_options(folder, role=role, **changes) for role in ("prefill", "decode"))  # type: ignore[return-value]


# -- tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_mixed_worker_says_the_tokens_of_a_plain_forward_pass_also_when_prompts_share_its_steps(
    stream: bool, tmp_path: Path
) -> None:
    prompts = [prompt_of(tokens) for tokens in PROMPTS]

    async def work() -> list[list[int]]:
        async with torch_workers(torch_options(tmp_path)) as [(worker, _)]:
            return list(await asyncio.gather(*(told_by(worker.address, each, stream=stream) for each in prompts)))

    assert run(work()) == [plainly(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_a_pair_behind_the_gateway_says_the_same_tokens(stream: bool, tmp_path: Path) -> None:
    prompts = [prompt_of(tokens) for tokens in PROMPTS]

    async def work() -> tuple[list[list[int]], list[int]]:
        async with torch_workers(*pair(tmp_path)) as running:
            at = {worker.options.role: [{"profile": "p", "url": worker.address}] for worker, _ in running}
            settings = settings_for({"prefill": [], "decode": [], "mixed": []} | at, profiles=PROFILES)
            async with running_gateway(settings) as gateway:
                told = await asyncio.gather(*(told_by(gateway.server.address, each, stream=stream) for each in prompts))
            return list(told), [engine.running + engine.waiting for _, engine in running]

    told, left = run(work(), 60.0)

    assert told == [plainly(prompt, 8) for prompt in prompts]
    assert left == [0, 0]


PROFILES = {
    "p": {
        "gpu": "CPU",
        "model": "tiny",
        "step_times": {"linear": {"prefill": {"a_s": 1e-3, "b_s": 2e-5}, "decode": {"a_s": 1e-3, "b_s": 1e-4}}},
    }
}


@pytest.mark.parametrize(
    "strategy",
    [
        "on-time+late+headroom+envelope",
        "fcfs+round-robin+least-requests+continuous",
        "edf(lost_last=true,preempt=true)+late+headroom+slack",
        "kairos-paper+round-robin+least-requests+kairos-paper",
        "sjf(preempt=true)+late+headroom+capped",
        "dataplane.bad_policies:Raises+late+headroom+continuous",
    ],
)
def test_no_strategy_changes_a_token_and_a_crowd_leaves_no_slot_taken(strategy: str, tmp_path: Path) -> None:
    prompts = [prompt_of(tokens, seed) for seed, tokens in enumerate([200, 3, 90, 31, 500, 12, 64, 150, 7, 320, 45, 1])]

    async def work() -> tuple[list[list[int]], int]:
        options = torch_options(tmp_path, strategy=strategy, slots=4, ttft_s=0.2, tpot_s=0.01)
        async with torch_workers(options) as [(worker, engine)]:
            told = await asyncio.gather(*(told_by(worker.address, each) for each in prompts))
            return list(told), engine.running + engine.waiting

    told, left = run(work(), 60.0)

    assert told == [plainly(prompt, 8) for prompt in prompts]
    assert left == 0


def test_a_strategy_that_comes_while_requests_run_is_in_force_and_changes_no_token(tmp_path: Path) -> None:
    prompts = [prompt_of(tokens, 5) for tokens in (400, 30, 200, 9)]
    fcfs = parse_strategy("fcfs+round-robin+least-requests+continuous")

    async def work() -> tuple[list[list[int]], str]:
        nowhere = "http://127.0.0.1:9"
        async with torch_workers(torch_options(tmp_path, slots=2, control_plane=nowhere)) as [(worker, engine)]:
            asked = [asyncio.ensure_future(told_by(worker.address, each, max_tokens=30)) for each in prompts]
            await until(lambda: engine.generated > 3)
            assert engine.policies.control_plane is not None
            engine.policies.control_plane.news.append(NewStrategy(fcfs, "plain"))
            told = await asyncio.gather(*asked)
            return list(told), engine.policies.planner.decider.strategy.text

    told, strategy = run(work(), 60.0)

    assert told == [plainly(prompt, 30) for prompt in prompts]
    assert strategy == fcfs.text


def test_an_end_token_of_the_model_ends_a_sequence_unless_it_is_ignored(tmp_path: Path) -> None:
    from torches import TINY, config_of

    prompt = prompt_of(50)
    told = plainly(prompt, 8)
    (tmp_path / "config.json").write_bytes(config_of(TINY, eos_token_id=told[3]))
    options = torch_options(tmp_path, model=str(tmp_path / "config.json"), name="tiny")

    async def work() -> tuple[Any, list[int]]:
        async with torch_workers(options) as [(worker, _)]:
            body = json.loads((await call(worker.address, "/v1/completions", completion(prompt)))[1])
            return body["choices"][0], await told_by(worker.address, prompt, ignore_eos=True)

    ended, ignored = run(work())

    first = told.index(told[3])
    assert (ended["token_ids"], ended["finish_reason"]) == (told[: first + 1], "stop")
    assert ignored == told


def test_text_goes_in_as_bytes_and_comes_out_as_numbers(tmp_path: Path) -> None:
    async def work() -> Any:
        async with torch_workers(torch_options(tmp_path)) as [(worker, _)]:
            return json.loads((await call(worker.address, "/v1/completions", completion("abc", max_tokens=2)))[1])

    body = run(work())

    assert body["choices"][0]["text"] == "".join(f" {token}" for token in plainly(list(b"abc"), 2))
    assert body["usage"]["prompt_tokens"] == 3


# -- policies


def test_a_short_prompt_that_is_due_overtakes_a_long_one_between_its_chunks_and_not_first_come_first_served(
    tmp_path: Path,
) -> None:
    async def first_done(strategy: str) -> str:
        options = torch_options(tmp_path, strategy=strategy, slot_tokens=8192, chunk_tokens=32)
        async with torch_workers(options) as [(worker, engine)]:
            done: list[str] = []

            async def ask(name: str, prompt: list[int], ttft_s: float) -> None:
                await told_by(worker.address, prompt, max_tokens=1, vllm_xargs={"kairos_ttft_s": ttft_s})
                done.append(name)

            async with asyncio.TaskGroup() as group:
                group.create_task(ask("long", prompt_of(6000), 100.0))
                await until(lambda: engine.steps > 2)
                group.create_task(ask("short", prompt_of(20), 0.5))
            return done[0]

    assert run(first_done("on-time+late+headroom+envelope"), 60.0) == "short"
    assert run(first_done("fcfs+late+headroom+continuous"), 60.0) == "long"


def test_every_token_of_prompts_and_every_decode_is_in_the_steps_it_reports(tmp_path: Path) -> None:
    steps: list[StepRecord] = []
    prompts = [prompt_of(tokens, 3) for tokens in (200, 40, 100)]

    async def work() -> None:
        async with torch_workers(torch_options(tmp_path), on_step=steps.append) as [(worker, _)]:
            await asyncio.gather(*(told_by(worker.address, each) for each in prompts))

    run(work())

    assert sum(step.new_tokens for step in steps) == 340
    assert sum(step.batch_size for step in steps) == 3 * 7
    assert max(step.new_tokens + step.batch_size for step in steps) <= 64
    assert all(step.step_s > 0 and (step.kind != "prefill") == bool(step.batch_size) for step in steps)


# -- handing over


def test_kv_is_taken_once_and_only_within_its_lease(tmp_path: Path) -> None:
    prompt = prompt_of(40)

    async def work() -> tuple[list[int], int]:
        async with torch_workers(*pair(tmp_path, lease_s=0.5)) as [(prefill, _), (decode, _)]:
            statuses = []
            for pause_s in (0.0, 0.6):
                made = await call(prefill.address, "/v1/completions", completion(prompt, kv_transfer_params=PRODUCE))
                params = json.loads(made[1])["kv_transfer_params"]
                await asyncio.sleep(pause_s)
                for _ in range(2):
                    asked = completion(prompt, kv_transfer_params=params)
                    statuses.append((await call(decode.address, "/v1/completions", asked))[0])
            await until(lambda: not decode.gpu.running)
            return statuses, prefill.desk.held_tokens

    assert run(work()) == ([200, 500, 500, 500], 0)


def test_kv_of_another_model_is_refused(tmp_path: Path) -> None:
    prompt = prompt_of(40)
    prefill_options, decode_options = (
        torch_options(tmp_path, role="prefill"),
        torch_options(tmp_path, role="decode", model="small", name="tiny", slot_tokens=64),
    )

    async def work() -> tuple[int, bytes]:
        async with torch_workers(prefill_options, decode_options) as [(prefill, _), (decode, _)]:
            made = await call(prefill.address, "/v1/completions", completion(prompt, kv_transfer_params=PRODUCE))
            params = json.loads(made[1])["kv_transfer_params"]
            return await call(decode.address, "/v1/completions", completion(prompt, kv_transfer_params=params))

    status, body = run(work())

    assert status == 500
    assert b"need the same model" in body


def test_kv_waits_with_its_holder_while_decode_is_full_and_its_lease_is_renewed(tmp_path: Path) -> None:
    prompts = [prompt_of(40, seed) for seed in range(3)]

    async def work() -> list[list[int]]:
        options = pair(tmp_path, slots=1, lease_s=0.3, slot_tokens=4096)
        async with torch_workers(*options) as [(prefill, _), (decode, _)]:
            asked = []
            for prompt in prompts:
                made = await call(prefill.address, "/v1/completions", completion(prompt, kv_transfer_params=PRODUCE))
                params = json.loads(made[1])["kv_transfer_params"]
                asked.append(
                    asyncio.ensure_future(told_by(decode.address, prompt, kv_transfer_params=params, max_tokens=400))
                )
            return list(await asyncio.gather(*asked))

    told = run(work(), 60.0)

    assert [each[:8] for each in told] == [plainly(prompt, 8) for prompt in prompts]
    assert [len(each) for each in told] == [400] * 3


# -- bad input and ends


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": [0, 512]}, b"from 0 to 511"),
        ({"prompt": [-1]}, b"from 0 to 511"),
        ({"prompt": [1] * 1020}, b"over 1024 tokens"),
        ({"prompt": ""}, b"at least one token"),
    ],
)
def test_a_prompt_that_it_cannot_compute_is_refused(changes: dict[str, Any], told: bytes, tmp_path: Path) -> None:
    async def work() -> tuple[int, bytes]:
        async with torch_workers(torch_options(tmp_path)) as [(worker, _)]:
            return await call(worker.address, "/v1/completions", completion([1]) | changes)

    status, body = run(work())

    assert status == 400
    assert told in body


def test_a_client_that_leaves_gives_its_slot_to_the_next(tmp_path: Path) -> None:
    prompt = prompt_of(30)

    async def work() -> list[int]:
        async with torch_workers(torch_options(tmp_path, slots=1)) as [(worker, engine)]:
            pool = HttpPool(worker.address)
            endless = json.dumps(completion(prompt_of(8), stream=True, max_tokens=1000)).encode()
            answer = await pool.send(b"POST", b"/v1/completions", (), endless)
            await answer.chunk()
            waiting = asyncio.ensure_future(told_by(worker.address, prompt))
            await until(lambda: engine.waiting == 1)
            pool.close()
            return await waiting

    assert run(work()) == plainly(prompt, 8)


def test_a_step_has_tokens_for_every_sequence(tmp_path: Path) -> None:
    ended = kairos("worker", "torch", "--model", "tiny", "--slots", 16, "--chunk-tokens", 31)

    assert ended.code == 2
    assert "give at least 32" in ended.stderr


def test_the_command_serves_until_it_is_ended_and_leaves_its_steps_in_a_folder(tmp_path: Path) -> None:
    from gateways import free_ports

    [port] = free_ports(1)
    arguments = ("--model", "tiny", "--port", port, "--slot-tokens", 256, "--telemetry", tmp_path / "steps")

    with process("worker", "torch", *arguments):
        wait_for(f"http://127.0.0.1:{port}/health")
        told = run(told_by(f"http://127.0.0.1:{port}", prompt_of(40)))

    read = read_telemetry([tmp_path / "steps"])
    assert told == plainly(prompt_of(40), 8)
    assert {steps.kind: len(steps) for steps in read.steps} == {"prefill": 1, "decode": 7}
    assert {steps.profile.engine for steps in read.steps} == {"torch"}
