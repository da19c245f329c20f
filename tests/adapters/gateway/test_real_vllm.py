"""A real vLLM prefill/decode pair on the CPU behind the gateway.

KAIROS_VLLM names an environment with vLLM 0.28 or later (CPU build, NIXL), KAIROS_VLLM_MODEL a small model, which
it serves as `tiny` in float32. Takes three minutes on two idle cores.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from gateways import free_ports, process, wait_for

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif("KAIROS_VLLM" not in os.environ, reason="KAIROS_VLLM names no environment with vLLM"),
]

LINEAR = {"prefill": {"a_s": 0.01, "b_s": 2e-4}, "decode": {"a_s": 0.012, "b_s": 1e-4}}
STARTS_S = 600


class Pair(NamedTuple):
    """What runs."""

    gateway: str
    alone: str
    """The decode engine, asked without a handshake: the single engine to compare with."""
    start_prefill: Any
    prefill: list["subprocess.Popen[bytes]"]


@contextmanager
def engine(port: int, side: int, role: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A vLLM engine; it and what it has started end together."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    command = [
        *(f"{os.environ['KAIROS_VLLM']}/bin/vllm", "serve", os.environ["KAIROS_VLLM_MODEL"]),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "8192", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "--enforce-eager"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    environment = os.environ | {
        **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"},
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        **{"UCX_TLS": "tcp,shm,self", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"},
        **{"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side), "PATH": f"{os.environ['KAIROS_VLLM']}/bin:{os.environ['PATH']}"},
    }
    environment.pop("PYTHONPATH", None)
    with log.open("ab") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield running
    finally:
        kill(running)


def kill(running: "subprocess.Popen[bytes]") -> None:
    """End an engine with its workers, as a machine that fails does."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    prefill, decode, front, side_one, side_two = free_ports(5)
    group = {"profile": "p", "control": "gateway"}
    document = {
        "profiles": {"p": {"gpu": "CPU", "model": "tiny", "step_times": {"linear": LINEAR}}},
        "fleet": {
            "prefill": [group | {"url": f"http://127.0.0.1:{prefill}"}],
            "decode": [group | {"url": f"http://127.0.0.1:{decode}"}],
        },
        "gateway": {"port": front},
    }
    config = folder / "kairos.yaml"
    config.write_text(yaml.safe_dump(document))
    with ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []

        def start_prefill() -> None:
            started.append(stack.enter_context(engine(prefill, side_one, "kv_producer", folder / "prefill.log")))

        start_prefill()
        stack.enter_context(engine(decode, side_two, "kv_consumer", folder / "decode.log"))
        stack.enter_context(process("gateway", "--config", config))
        wait_for(f"http://127.0.0.1:{front}/health", STARTS_S)
        yield Pair(f"http://127.0.0.1:{front}", f"http://127.0.0.1:{decode}", start_prefill, started)


def ask(address: str, tokens: int, stream: bool) -> tuple[int, str]:
    """Status, and the text that a prompt of so many tokens is answered with, greedily."""
    prompt = [(7 * place + tokens) % 900 + 10 for place in range(tokens)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": stream}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=300)
    if answer.status_code != 200 or not stream:
        told = answer.json()
        return answer.status_code, told["choices"][0]["text"] if "choices" in told else told["error"]["code"]
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return 200, "".join(json.loads(event)["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [100, 700, 2000, 5000])
def test_a_pair_says_what_one_engine_says(pair: Pair, tokens: int, stream: bool) -> None:
    assert ask(pair.gateway, tokens, stream) == ask(pair.alone, tokens, stream)


def test_no_kv_was_given_up(pair: Pair) -> None:
    text = httpx.get(f"{pair.gateway}/metrics").text

    assert 'kairos_gateway_instance_kv_expired_total{instance="prefill-0",role="prefill"} 0.0' in text


def test_a_prefill_engine_that_is_killed_is_an_error_and_one_that_comes_back_serves_again(pair: Pair) -> None:
    kill(pair.prefill[-1])
    dead = ask(pair.gateway, 100, stream=True)
    pair.start_prefill()
    wait_for(f"{pair.gateway}/health", STARTS_S)

    assert dead == (503, "no_instance")
    assert ask(pair.gateway, 100, stream=True) == ask(pair.alone, 100, stream=True)
