"""Real vLLM servers on this machine, with and without the plugin, and what is asked of them."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from kairos.adapters.embedded.status import EngineStatus, read_all

ROOT = Path(__file__).parents[2]
ENGINES = Path(os.environ.get("KAIROS_ENGINES", ROOT / ".engines"))
VERSIONS = ("0.28.0", "0.32.0")
LINEAR = {"prefill": {"a_s": 0.012, "b_s": 2e-4, "c_s": 1e-8}, "decode": {"a_s": 0.01, "b_s": 1e-3, "c_s": 2e-7}}
"""About what the small model takes on one core."""


def python_of(version: str) -> Path:
    """The Python that has this vLLM; installed where it is missing."""
    subprocess.run([ROOT / "tests" / "engine" / "install", version], check=True)
    return ENGINES / f"vllm-{version}" / "bin" / "python"


def small_model() -> Path:
    """The folder of the small model; made where it is missing."""
    folder = ENGINES / "small-model"
    if not (folder / "model.safetensors").exists():
        subprocess.run(
            [python_of(VERSIONS[-1]), ROOT / "tests" / "engine" / "inside" / "make_model.py", folder], check=True
        )
    return folder


def prompt_of(tokens: int, seed: int) -> list[int]:
    """A prompt of that length; other seeds share no prefix."""
    return [random.Random(seed).randrange(3, 1000) for _ in range(tokens)]


@dataclass
class Outcome:
    """One request as its client saw it."""

    token_ids: list[int] = field(default_factory=list)
    started_s: float = field(default_factory=time.perf_counter)
    ttft_s: float = float("nan")
    last_s: float = float("nan")
    """From its start to its last token."""
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """When its first token came, on the clock of `started_s`."""
        return self.started_s + self.ttft_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.last_s - self.ttft_s) / (len(self.token_ids) - 1) if len(self.token_ids) > 1 else 0.0


class Server:
    """Something that answers the OpenAI API for the small model: an engine, or a gateway in front of some."""

    def __init__(self, url: str) -> None:
        self.url = url

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client for many requests at once, each on a connection of its own: none that the server has just closed."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits, trust_env=False) as client:
            yield client

    async def ask(
        self,
        client: httpx.AsyncClient,
        prompt: Sequence[int],
        output: int,
        hang_up_after: int | None = None,
        **more: Any,
    ) -> Outcome:
        """Stream a completion; `hang_up_after` closes the connection after so many tokens."""
        body = {
            "model": "small",
            "prompt": list(prompt),
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **more,
        }
        seen = Outcome()
        try:
            await self._stream(client, body, seen, hang_up_after)
        except httpx.TransportError as problem:
            seen.error = repr(problem)
        return seen

    async def _stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], seen: Outcome, hang_up_after: int | None
    ) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                seen.error = (await answer.aread()).decode()
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    seen.error = json.dumps(event["error"])
                    return
                tokens = [t for choice in event["choices"] for t in choice.get("token_ids") or ()]
                if not tokens:
                    continue
                seen.last_s = time.perf_counter() - seen.started_s
                if not seen.token_ids:
                    seen.ttft_s = seen.last_s
                seen.token_ids += tokens
                if hang_up_after is not None and len(seen.token_ids) >= hang_up_after:
                    return

    def ask_whole(self, prompt: Sequence[int], output: int) -> list[int]:
        """The tokens of a completion that comes in one piece."""
        body = {"model": "small", "prompt": list(prompt), "max_tokens": output, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300, trust_env=False)
        tokens: list[int] = answer.raise_for_status().json()["choices"][0]["token_ids"]
        return tokens

    async def holds(self, client: httpx.AsyncClient, running: int, waiting: int) -> None:
        """Return once so many requests run and wait in it."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while True:
            text = (await client.get("/metrics")).text
            if [total(text, name) for name in names] == [running, waiting]:
                return
            await asyncio.sleep(0.01)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return total(httpx.get(f"{self.url}/metrics", trust_env=False).text, name)

    def is_healthy(self) -> bool:
        """Whether it says so."""
        return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200


class Engine(Server):
    """A running vLLM."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", status_folder: Path) -> None:
        super().__init__(url)
        self.process, self.status_folder = process, status_folder

    def kill(self) -> None:
        """End it with its workers, as a machine that fails does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def status(self) -> EngineStatus:
        """What the plugin in it wrote last, once it has written after now."""
        asked_s = time.time()
        while time.time() - asked_s < 120:
            found = [status for status in read_all(self.status_folder) if status.written_s > asked_s]
            if found:
                return found[0]
            time.sleep(0.2)
        raise AssertionError(f"no plugin wrote to {self.status_folder}")


def total(text: str, name: str) -> float:
    """The sum of a metric over its labels, in the text of a Prometheus page."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(
    version: str,
    folder: Path,
    *arguments: str,
    plugin: bool = True,
    environment: dict[str, str] | None = None,
    name: str = "engine",
    port: int | None = None,
    **settings: Any,
) -> Iterator[Engine]:
    """A server with the small model, at a port or any; `settings` are the plugin's."""
    python, model, port = python_of(version), small_model(), port or free_port()
    status_folder = folder / f"{name}-status"
    told = {"linear": LINEAR, "status_dir": str(status_folder), "decision_budget_s": 0.05, **settings}
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KAIROS_ENGINE_"))},
        **{f"KAIROS_ENGINE_{key.upper()}": json.dumps(value) for key, value in told.items() if plugin},
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        **(environment or {}),
    }
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "small"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "8192", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"]
    command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log", *arguments]
    if plugin:
        command += ["--scheduler-cls", "kairos.adapters.vllm.Scheduler"]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=variables, cwd=folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        engine = Engine(f"http://127.0.0.1:{port}", process, status_folder)
        _until_healthy(engine, log)
        yield engine
    finally:
        with suppress(ProcessLookupError):  # killed
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def joined(
    version: str, folder: Path, role: str, *arguments: str, lease_s: int = 30, **serving: Any
) -> AbstractContextManager[Engine]:
    """One engine of a pair that moves KV over loopback; `serving` is more for `serve`."""
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": {"kv_lease_duration": lease_s},
    }
    loopback = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    loopback |= {"UCX_TLS": "tcp,shm,self", "UCX_NET_DEVICES": "lo"}
    told = ("--kv-transfer-config", json.dumps(transfer), *arguments)
    return serve(version, folder, *told, environment=loopback, name=role, **serving)


def _until_healthy(engine: Engine, log: Path) -> None:
    started_s = time.monotonic()
    while time.monotonic() - started_s < 600:
        if engine.process.poll() is not None:
            raise AssertionError("the server ended:\n" + "\n".join(log.read_text().splitlines()[-60:]))
        try:
            if engine.is_healthy():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("the server did not start:\n" + "\n".join(log.read_text().splitlines()[-60:]))


def run(work: Any) -> Any:
    """Run a coroutine."""
    return asyncio.run(work)
