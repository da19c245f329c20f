"""What Kairos takes of a machine: memory and CPU of service, training and gateway, and bytes in the store.

CPU is what the kernel charges the process, so other work on the machine moves it little.

    python benchmarks/sizing.py
"""

import gzip
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from live_against_simulated import cpu_s
from record import meta

from kairos.adapters.cli.processes import free_ports, running, wait_for

ROOT = Path(__file__).parents[1]
STEPS, BATCH, CALLS = 30_000, 10_000, 300
REQUESTS, PROMPT_TOKENS = 1_000, 2_000
PROFILE = {"gpu": "B300-SXM6", "model": "Qwen/Qwen3-32B", "precision": "bf16", "tp": 4, "engine": "vllm"}
LINEAR = {"prefill": {"a_s": 0.0082, "b_s": 1.48e-5, "c_s": 3.9e-10}, "decode": {"a_s": 0.0059, "b_s": 3.1e-5}}


def memory_mb(pid: int, peak: bool = False) -> float:
    """Resident memory of a process, now or at most, in MB."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    told = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in told.split()]


def steps(count: int) -> list[dict[str, Any]]:
    """Decode steps of one profile, all different."""
    rows = []
    for n in range(count):
        batch, context = 1 + n % 64, 500 + 37 * n % 8_000
        latency_ms = 1e3 * (0.0059 + 3.1e-5 * batch + 1e-8 * batch * context) * (1 + n % 11 / 1_000)
        rows.append(PROFILE | {"batch_size": batch, "sum_context_tokens": batch * context, "latency_ms": latency_ms})
    return rows


def service(folder: Path) -> dict[str, float]:
    """The control plane on SQLite: idle, taking telemetry in, deciding, training."""
    document = yaml.safe_load((ROOT / "examples" / "kairos.yaml").read_text())
    config, log, database = folder / "kairos.yaml", folder / "serve.log", folder / "kairos.db"
    config.write_text(yaml.safe_dump(document | {"store": {"url": f"sqlite:///{database}"}}))
    (port,) = free_ports(1)
    snapshot = json.loads((ROOT / "examples" / "schedule.json").read_text())
    with running(log, "serve", "--config", config, "--port", port) as started:
        process = started.process
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/healthz", started)
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            client.get("/readyz").raise_for_status()
            found = {"idle_mb": memory_mb(process.pid)}
            before_s, rows = cpu_s(process), steps(STEPS)
            for start in range(0, STEPS, BATCH):
                body = gzip.compress(json.dumps(rows[start : start + BATCH]).encode(), 1)
                headers = {"content-type": "application/json", "content-encoding": "gzip"}
                client.post("/telemetry/steps", content=body, headers=headers).raise_for_status()
            found["ingest_us_per_row"] = (cpu_s(process) - before_s) / STEPS * 1e6
            before_s = cpu_s(process)
            for _ in range(CALLS):
                client.post("/schedule", json=snapshot).raise_for_status()
            found["schedule_us_per_call"] = (cpu_s(process) - before_s) / CALLS * 1e6
            number = client.post("/models/train", json={}).raise_for_status().json()["id"]
            peak_mb = 0.0
            while not client.get(f"/models/trainings/{number}").json()["ended_at"]:
                for child in children(process.pid):
                    try:
                        peak_mb = max(peak_mb, memory_mb(child, peak=True))
                    except (OSError, StopIteration):
                        continue
                time.sleep(0.1)
            found |= {"training_mb": peak_mb, "after_mb": memory_mb(process.pid)}
    found["bytes_per_step"] = sum(path.stat().st_size for path in folder.glob("kairos.db*")) / STEPS
    return found


def gateway(folder: Path) -> dict[str, float]:
    """The gateway in front of one emulated worker: idle, then with requests that wait in it."""
    front, back = free_ports(2)
    group = {"profile": "p", "url": f"http://127.0.0.1:{back}", "engine": "vllm"}
    slow = {"prefill": {"a_s": 60.0}, "decode": {"a_s": 0.01}}
    settings = {
        "profiles": {"p": PROFILE | {"step_times": {"linear": slow}}},
        "fleet": {"mixed": [group]},
        "gateway": {"port": front},
    }
    config, trace = folder / "gateway.yaml", folder / "trace.csv"
    config.write_text(yaml.safe_dump(settings))
    rows = "".join(f"{n / 100},{PROMPT_TOKENS},2\n" for n in range(REQUESTS))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    sent = ("load", trace, "--fleet", config, "--url", f"http://127.0.0.1:{front}", "--out", folder / "live")
    logs = {name: folder / f"{name}.log" for name in ("worker", "gateway", "load")}
    with (
        running(logs["worker"], "worker", "emulate", "--config", config, "--whole-fleet") as worker,
        running(logs["gateway"], "gateway", "--config", config) as started,
    ):
        wait_for(f"http://127.0.0.1:{front}/health", worker, started)
        process = started.process
        found = {"idle_mb": memory_mb(process.pid)}
        before_s = cpu_s(process)
        with running(logs["load"], *sent):
            while waiting(front) < REQUESTS - 2:
                time.sleep(0.2)
            found["waiting_kb_per_request"] = (memory_mb(process.pid) - found["idle_mb"]) / REQUESTS * 1e3
            found["arrival_us_per_request"] = (cpu_s(process) - before_s) / REQUESTS * 1e6
    return found


def waiting(port: int) -> float:
    """Requests that wait in the gateway."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("kairos_gateway_waiting "))


def main() -> None:
    """Measure, write, print."""
    with tempfile.TemporaryDirectory() as name:
        results = {"service": service(Path(name)), "gateway": gateway(Path(name))}
    about = {"steps": STEPS, "requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS, "cores": os.cpu_count()}
    told = {"meta": meta("python benchmarks/sizing.py"), "about": about, **results}
    (Path(__file__).parent / "results" / "sizing.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
