"""What the gateway costs beside its peers: CPU per request, per stream and per token, and the first byte it adds.

One core runs the gateway or a peer, the other a stub engine and a closed-loop generator. CPU is what the kernel charges
the measured process, so other work on the machine moves it little; requests per second of CPU are the throughput that
one core could give. Modes: plain, PD with NIXL's serial handshake, PD with both legs at once (SGLang's). Kairos
predicts, decides by its policies and logs every request, to a control plane that takes what it is sent.

    python benchmarks/gateway.py --rounds 5 --out benchmarks/results/gateway.json
    python benchmarks/gateway.py --peers VENV      # with sglang-router and vllm-router from that environment

Requests without a stream come from `wrk` where that is on the PATH, streams from a client in Python.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
import yaml
from record import meta

MODEL = "tiny"
TOKENS = 32
PACE_S = 0.005
PROFILE = {"gpu": "H100", "model": MODEL, "step_times": {"linear": {"prefill": {"b_s": 1e-9}, "decode": {"a_s": 1e-3}}}}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

_HEAD = b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"tiny",'
_USAGE = b'"usage":{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":40}}'
EVENT = b"data: " + _HEAD + b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
USAGE = b"data: " + _HEAD + b'"choices":[],' + _USAGE % TOKENS + b"\n\n"
DONE = b"data: [DONE]\n\n"
KV = (
    b'"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[1,2],'
    b'"remote_engine_id":"e","remote_request_id":"r","remote_host":"h","remote_port":1},'
)
WHOLE = b'"choices":[{"index":0,"text":" word","finish_reason":"length"}],' + _USAGE % 1


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = chunk(USAGE) + chunk(DONE) + b"0\r\n\r\n"
BURST = STREAM_HEAD + chunk(EVENT) * TOKENS + STREAM_END


def whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    """An answer in one piece."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


class Stub(asyncio.Protocol):
    """An engine that answers at once, of either dialect; `paced` streams send a token every PACE_S.

    As SGLang's prefill engine (on 127.0.0.1) it streams the first token only.

    Also a control plane that takes all telemetry and has nothing to say.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport: Any = transport
        self.data = b""

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self.data += data
        while (head := self.data.find(b"\r\n\r\n")) >= 0:
            fields, start = self.data[:head].lower(), head + 4
            if b"transfer-encoding: chunked" in fields:
                end = self.data.find(b"0\r\n\r\n", start) + 5
                if end < start + 5:
                    return
            else:
                at = fields.find(b"content-length:")
                end = start + (int(fields[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0)
                if len(self.data) < end:
                    return
            body, self.data = self.data[start:end], self.data[end:]
            if not fields.endswith(b" http/1.1") and b" http/1.1\r\n" not in fields:  # asks for HTTP/2
                self.transport.close()
                return
            self.answer(fields.split(b" ", 2)[1], body)

    def answer(self, path: bytes, body: bytes) -> None:
        """One answer."""
        if path.startswith((b"/strategies", b"/models")):
            self.transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        elif path.startswith(b"/telemetry"):
            self.transport.write(whole(b"{}"))
        elif not body:
            version = b'{"version":"0.32.0"}' if path == b"/version" else b'{"version":"0.5.23","data":[{"id":"tiny"}]}'
            self.transport.write(whole(version))
        elif b'"stream":true' not in body.replace(b" ", b""):
            self.transport.write(whole(_HEAD + (KV if b'"do_remote_decode":true' in body else b"") + WHOLE))
        elif b'"bootstrap_room":' in body and self.transport.get_extra_info("sockname")[0] == "127.0.0.1":
            self.transport.write(STREAM_HEAD + chunk(EVENT) + STREAM_END)
        elif b"paced" in body:
            self.transport.write(STREAM_HEAD)
            self.pace(TOKENS)
        else:
            self.transport.write(BURST)

    def pace(self, left: int) -> None:
        """Send the next token, and the others later."""
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(chunk(EVENT))
            asyncio.get_running_loop().call_later(PACE_S, self.pace, left - 1)
        else:
            self.transport.write(STREAM_END)


class Client(asyncio.Protocol):
    """A client that sends its next request when it has the last answer."""

    def __init__(self, request: bytes, stream: bool) -> None:
        self.request, self.stream = request, stream
        self.done = 0
        self.errors = 0
        self.first_s: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport: Any = transport
        self.send()

    def send(self) -> None:
        """Send a request."""
        self.parts: list[bytes] = []
        self.sent_s = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Take an answer in."""
        if not self.parts:
            self.first_s.append(time.perf_counter() - self.sent_s)
        self.parts.append(data)
        if self.stream and b"200 OK" in self.parts[0][:20]:
            complete = data.endswith(b"0\r\n\r\n")
        else:
            all_of_it = b"".join(self.parts)
            head, found, body = all_of_it.partition(b"\r\n\r\n")
            lower = head.lower()
            at = lower.find(b"content-length:")
            complete = bool(found) and (
                len(body) >= int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else body.endswith(b"0\r\n\r\n")
            )
        if complete:
            self.done += 1
            self.errors += not self.parts[0].startswith(b"HTTP/1.1 200")
            self.send()


def body_text(stream: bool, prompt: str) -> str:
    """The body of a completion."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS if stream else 1}
    return json.dumps(body | {"stream": True} if stream else body)


def request_bytes(port: int, stream: bool, prompt: str) -> bytes:
    """A completion."""
    raw = body_text(stream, prompt).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n" % port
    return head + b"content-length: %d\r\n\r\n%b" % (len(raw), raw)


def cpu_s(process: "subprocess.Popen[bytes]") -> float:
    """Seconds of CPU of a process and its threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


CASES = {
    "whole": (False, "hello", 64),
    "stream": (True, "hello", 64),
    "paced": (True, "paced", 64),
    "220 KB": (False, "word " * 45_000, 8),
    "first byte": (False, "hello", 1),
}
"""Stream or not, prompt, connections."""


async def wrk(port: int, prompt: str, connections: int, seconds: float) -> tuple[int, float]:
    """Requests that `wrk` had answered, and the median of their latency in us."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write('wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\n')
        script.write(f"wrk.body = [==[{body_text(False, prompt)}]==]\n")
        script.flush()
        how = ("-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "-s", script.name)
        url = f"http://127.0.0.1:{port}/v1/completions"
        running = await asyncio.create_subprocess_exec("wrk", *how, url, stdout=subprocess.PIPE)
        told = (await running.communicate())[0].decode()
    done, median = re.search(r"(\d+) requests in", told), re.search(r"50%\s+([\d.]+)(us|ms|s)", told)
    if done is None or median is None or "Non-2xx" in told or "Socket errors" in told:
        raise SystemExit(told)
    return int(done[1]), float(median[1]) * {"us": 1.0, "ms": 1e3, "s": 1e6}[median[2]]


async def load(port: int, case: str, seconds: float, process: "subprocess.Popen[bytes]") -> dict[str, float]:
    """Drive one case for some seconds."""
    stream, prompt, connections = CASES[case]
    if not stream and shutil.which("wrk"):
        await wrk(port, prompt, connections, 1.0)
        before, began_s = cpu_s(process), time.perf_counter()
        answered, median_us = await wrk(port, prompt, connections, seconds)
        return figures(answered, cpu_s(process) - before, time.perf_counter() - began_s, median_us)
    loop = asyncio.get_running_loop()
    raw = request_bytes(port, stream, prompt)
    clients = [Client(raw, stream) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.sleep(0.5)
    before, done, began_s = cpu_s(process), sum(client.done for client in clients), time.perf_counter()
    for client in clients:
        client.first_s.clear()
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began_s
    used_s, done = cpu_s(process) - before, sum(client.done for client in clients) - done
    first_s = sorted(first for client in clients for first in client.first_s)
    for client in clients:
        client.transport.abort()
    if not done or any(client.errors for client in clients):
        raise SystemExit(f"{case}: {done} answers, {sum(client.errors for client in clients)} errors; see its log")
    result = figures(done, used_s, took_s, first_s[len(first_s) // 2] * 1e6)
    if stream:
        result["cpu_us_per_token"] = used_s / done / TOKENS * 1e6
    return result


def figures(done: int, used_s: float, took_s: float, first_byte_p50_us: float) -> dict[str, float]:
    """What was measured of one case."""
    return {
        "cpu_us_per_request": used_s / done * 1e6,
        "requests_per_cpu_s": done / used_s if used_s else float("nan"),
        "requests_per_s": done / took_s,
        "first_byte_p50_us": first_byte_p50_us,
    }


@contextmanager
def running(command: list[str], core: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process on one core."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, preexec_fn=lambda: os.sched_setaffinity(0, {core}), start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fleet_of(mode: str, port: int) -> dict[str, Any]:
    """The fleet section of a mode: all engines are the stub."""
    group = {"profile": "p", "in_flight": 1000}
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.2:{port}"]
    if mode == "plain":
        return {"mixed": [group | {"url": urls[0], "engine": "vllm"}]}
    engine = "sglang" if mode == "concurrent" else "vllm"
    return {
        "prefill": [group | {"url": urls[0], "engine": engine}],
        "decode": [{"profile": "p", "url": urls[1], "engine": engine}],
    }


def commands(mode: str, stub: int, port: int, peers: Path | None, folder: Path) -> dict[str, list[str]]:
    """What is measured in a mode."""
    config = folder / f"{mode}.yaml"
    gateway = {"port": port, "control_plane": {"url": f"http://127.0.0.1:{stub}"}}
    settings = {"profiles": {"p": PROFILE}, "fleet": fleet_of(mode, stub), "gateway": gateway}
    config.write_text(yaml.safe_dump(settings))
    program = "from kairos.adapters.cli import main; main()"
    found = {"kairos": [sys.executable, "-c", program, "gateway", "--config", str(config)]}
    if peers is None:
        return found
    one, two = f"http://127.0.0.1:{stub}", f"http://127.0.0.2:{stub}"
    listen = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    python = str(peers / "bin" / "python")
    if mode == "plain":
        found["sglang-router"] = [python, "-m", "sglang_router.launch_router", "--worker-urls", one, *listen]
        found["vllm-router"] = [python, "-m", "vllm_router.launch_router", "--worker-urls", one, *listen]
    elif mode == "concurrent":
        pair = ["--pd-disaggregation", "--prefill", one, "8998", "--decode", two]
        found["sglang-router"] = [python, "-m", "sglang_router.launch_router", *pair, *listen]
    else:
        pair = ["--vllm-pd-disaggregation", "--prefill", one, "--decode", two, "--kv-connector", "nixl"]
        found["vllm-router"] = [python, "-m", "vllm_router.launch_router", *pair, *listen]
    return found


async def answers(port: int) -> None:
    """Wait until a completion is answered."""
    for _ in range(600):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes(port, False, "hello"))
            line = await reader.readline()
            writer.close()
            if b" 200 " in line:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit(f"nothing answers on port {port}")


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: statistics.median(told[key] for told in rounds) for key in rounds[0]}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All modes, what is measured side by side in each round."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stub, ["127.0.0.1", "127.0.0.2"], arguments.port)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mode in arguments.modes:
            rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
            named = commands(mode, arguments.port, arguments.port + 1, arguments.peers, folder)
            for _ in range(arguments.rounds):
                for who, command in named.items():
                    with running(command, cores[0], arguments.log / f"{who}-{mode}.log") as process:
                        await answers(arguments.port + 1)
                        for case in CASES:
                            told = await load(arguments.port + 1, case, arguments.seconds, process)
                            rounds.setdefault(who, {}).setdefault(case, []).append(told)
            results[mode] = {
                who: {case: medians(found) for case, found in cases.items()} for who, cases in rounds.items()
            }
    server.close()
    return results


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--modes", nargs="+", default=["plain", "serial", "concurrent"])
    parser.add_argument("--peers", type=Path, help="a virtual environment with sglang-router and vllm-router")
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gateway.json")
    arguments = parser.parse_args()
    results = uvloop.run(measure(arguments))
    load_by = {"requests": "wrk" if shutil.which("wrk") else "Python", "streams": "Python"}
    told = {"meta": meta("python benchmarks/gateway.py") | {"load": load_by}, "results": results}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    for mode, who in results.items():
        for name, cases in who.items():
            for case, figures in cases.items():
                print(f"{mode:10} {name:14} {case:10} " + "  ".join(f"{k} {v:,.0f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
