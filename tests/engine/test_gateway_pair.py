"""A real vLLM prefill and decode engine, joined by NIXL, behind the gateway and its control plane."""

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from engine.engines import (
    LINEAR,
    VERSIONS,
    Engine,
    Outcome,
    Server,
    free_port,
    joined,
    prompt_of,
    python_of,
    run,
    small_model,
)
from gateways import process, wait_for
from serving import served

from kairos.scheduler_core.telemetry import REQUEST_STATUSES

pytestmark = pytest.mark.engine

VERSION = VERSIONS[-1]
CHATS = ("--chat-template", "{% for message in messages %}{{ message.content }} {% endfor %}")
MESSAGES: Any = [{"role": "system", "content": "w7 w8"}, {"role": "user", "content": " ".join(["w300 w301"] * 40)}]
OF_A_LOST_PREFILL = {"engine_lost", "engine_unreachable", "no_instance"}
"""Sent there and cut off; sent to nobody any more; waiting, or to be tried once more, with no other instance."""


@dataclass
class Pair:
    """What runs."""

    gateway: Server
    prefill: Engine
    decode: Engine
    """Asked without a handshake it is the single engine to compare with."""
    restart_prefill: Callable[[], None]
    database: Path

    def rows(self) -> list[str]:
        """What became of each request, by the store of the control plane."""
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True) as connection:
            found = connection.execute("select status from requests order by id").fetchall()
        return [REQUEST_STATUSES[status] for (status,) in found]

    def is_idle(self) -> bool:
        """Whether the gateway counts nothing as waiting or running, in itself or on an engine."""
        names = ("waiting", "running", "instance_requests")
        return sum(self.gateway.metric(f"kairos_gateway_{name}") for name in names) == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    port, front, database = free_port(), free_port(), folder / "kairos.db"
    python_of(VERSION), small_model()  # there before two start at once
    with ExitStack() as stack, ThreadPoolExecutor() as starting:

        def prefill() -> AbstractContextManager[Engine]:
            return joined(VERSION, folder, "kv_producer", *CHATS, plugin=False, port=port)

        behind = joined(VERSION, folder, "kv_consumer", *CHATS, plugin=False)
        first, decode = starting.map(stack.enter_context, (prefill(), behind))
        control, _ = stack.enter_context(served({**os.environ, "KAIROS_STORE__URL": f"sqlite:///{database}"}))
        group = {"profile": "small", "control": "gateway"}
        config = folder / "kairos.yaml"
        document = {
            "profiles": {"small": {"gpu": "CPU", "model": "small", "step_times": {"linear": LINEAR}}},
            "fleet": {"prefill": [group | {"url": first.url}], "decode": [group | {"url": decode.url}]},
            "gateway": {
                "port": front,
                "control_plane": {"url": control},
                "timeouts": {"first_token_s": 300},
                "health_s": 10,  # three that are not answered in time are an engine's end; these share two cores
            },
        }
        config.write_text(yaml.safe_dump(document))
        stack.enter_context(process("gateway", "--config", config))
        gateway = Server(f"http://127.0.0.1:{front}")
        wait_for(f"{gateway.url}/health")

        def restart_prefill() -> None:
            running.prefill = stack.enter_context(prefill())
            wait_for(f"{gateway.url}/health")

        running = Pair(gateway, first, decode, restart_prefill, database)
        yield running


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pair.gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def streams(server: Server, prompts: Sequence[list[int]], output: int) -> list[Outcome]:
    """What comes of requests that are all there at once."""
    async with server.client() as client:
        return list(await asyncio.gather(*(server.ask(client, prompt, output) for prompt in prompts)))


@pytest.mark.parametrize("tokens", [100, 700, 2000, 5000])
def test_a_pair_says_what_one_engine_says(pair: Pair, tokens: int) -> None:
    prompt = prompt_of(tokens, tokens)

    expected = pair.decode.ask_whole(prompt, 12)

    assert len(expected) == 12
    assert pair.gateway.ask_whole(prompt, 12) == expected
    (streamed,) = run(streams(pair.gateway, [prompt], 12))
    assert (streamed.error, streamed.token_ids) == ("", expected)


def test_no_kv_is_given_up(pair: Pair) -> None:
    assert pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 0
    assert pair.gateway.metric("kairos_gateway_instance_kv_expired_total") == 0


def test_the_official_client_gets_completions(pair: Pair, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": prompt_of(200, 3), "max_tokens": 9, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    alone = client.with_options(base_url=f"{pair.decode.url}/v1").completions.create(**asked)

    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    assert whole.choices[0].text == alone.choices[0].text
    assert whole.usage == alone.usage
    assert "".join(event.choices[0].text for event in events if event.choices) == alone.choices[0].text
    assert events[-1].usage == alone.usage


def test_the_official_client_chats(pair: Pair, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "small", "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    alone = client.with_options(base_url=f"{pair.decode.url}/v1").chat.completions.create(**asked)

    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True))

    assert whole.choices[0].message.content == alone.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    deltas = [event.choices[0].delta.content or "" for event in events]
    assert "".join(deltas) == alone.choices[0].message.content
    assert events[-1].choices[0].finish_reason == "length"


def test_the_official_client_lists_models_and_raises_its_own_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="small", prompt=prompt_of(9000, 1), max_tokens=1)
    with pytest.raises(openai.BadRequestError) as several:
        client.completions.create(model="small", prompt="w5", n=2)
    assert several.value.code == "several_sequences"


def test_vllms_own_benchmark_runs_against_it(pair: Pair, tmp_path: Path) -> None:
    command = [python_of(VERSION), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", pair.gateway.url, "--model", "small", "--tokenizer", small_model()]
    command += ["--dataset-name", "random", "--random-input-len", "200", "--random-output-len", "8", "--ignore-eos"]
    command += ["--num-prompts", "16", "--request-rate", "8", "--save-result", "--result-filename", "result.json"]

    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (16, 0)
    assert result["total_output_tokens"] == 16 * 8


def test_a_prefill_engine_that_is_killed_fails_what_it_had_and_serves_again_when_it_is_back(pair: Pair) -> None:
    prompts = [prompt_of(300, 100 + n) for n in range(30)]
    stored, ended = len(pair.rows()), pair.gateway.metric("kairos_gateway_requests_total")

    async def ask() -> list[Outcome]:
        running = asyncio.create_task(streams(pair.gateway, prompts, 12))
        while pair.gateway.metric("kairos_gateway_requests_total") < ended + 4:
            await asyncio.sleep(0.05)
        pair.prefill.kill()
        return await running

    got = run(ask())
    answered = [n for n, outcome in enumerate(got) if not outcome.error]
    codes = [re.findall(r'"code": ?"(\w+)"', outcome.error) for outcome in got if outcome.error]
    until(pair.is_idle)
    until(lambda: len(pair.rows()) >= stored + len(prompts))

    assert 4 <= len(answered) < len(prompts)
    assert all(code in OF_A_LOST_PREFILL for (code,) in codes)
    assert pair.gateway.metric("kairos_gateway_requests_total") == ended + len(prompts)
    became = Counter(pair.rows()[stored:])
    assert (became["finished"], became["failed"] + became["rejected"]) == (len(answered), len(codes))

    pair.restart_prefill()
    again, expected = (run(streams(server, prompts, 12)) for server in (pair.gateway, pair.decode))

    assert [outcome.error for outcome in again if outcome.error] == []
    assert [outcome.token_ids for outcome in again] == [outcome.token_ids for outcome in expected]
    assert [got[n].token_ids for n in answered] == [expected[n].token_ids for n in answered]


def test_a_decode_engine_that_is_killed_ends_its_streams_with_an_error_event(pair: Pair, client: openai.OpenAI) -> None:
    events = client.completions.create(model="small", prompt=prompt_of(100, 5), max_tokens=4000, stream=True)
    next(iter(events))

    pair.decode.kill()

    with pytest.raises(openai.APIError) as cut:
        list(events)
    assert cut.value.code == "engine_lost"
    until(pair.is_idle)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the gateway does by itself."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("a minute has passed")
