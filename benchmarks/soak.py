"""Whether the gateway and the service stay as they are: an hour of requests through them, with faults.

Four prefill and four decode instances are emulated at real speed, in front of them the gateway, and beside them the
control plane on SQLite, which takes all their telemetry and what became of every request. Each ten seconds the memory,
open files and threads of every program are read. Growth is the slope of a line through the memory after the first
quarter.

    python benchmarks/soak.py                                    # an hour
    python benchmarks/soak.py --seconds 120 --out /tmp/soak.json
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from live_against_simulated import CASES, cpu_s, settings_of, wait_for_all
from record import meta
from sizing import memory_mb

from kairos.adapters.cli.processes import Started, free_ports, running, wait_for

PER_S = 20.0
FAULTS = {"cut": 0.002, "sse_error": 0.002, "refuse": 0.002, "slow": 0.001, "hang": 0.0002}
EVERY_S = 10.0
CASE = CASES[1]


def requests(seconds: float) -> str:
    """A trace: Poisson arrivals, about 1,000 prompt tokens and 100 of output."""
    chance = np.random.default_rng(7)
    at_s = np.cumsum(chance.exponential(1 / PER_S, int(PER_S * seconds)))
    sizes = chance.lognormal((6.7, 4.4), (0.6, 0.6), (len(at_s), 2)).astype(int) + 1
    rows = "".join(f"{at:.4f},{prompt},{output}\n" for at, (prompt, output) in zip(at_s, sizes, strict=True))
    return "arrival_s,input_tokens,output_tokens\n" + rows


def seen(started: Started) -> dict[str, float]:
    """Memory, open files and threads of a program."""
    proc = Path(f"/proc/{started.process.pid}")
    files, threads = len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))
    return {"mb": memory_mb(started.process.pid), "files": files, "threads": threads}


def held(gateway: str) -> dict[str, float]:
    """What the gateway holds now: requests, of clients and on its instances, and connections."""
    text = httpx.get(f"{gateway}/metrics", trust_env=False).text
    found: Counter[str] = Counter()
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0].removeprefix("kairos_gateway_")
        if name in ("waiting", "running", "client_connections", "instance_requests", "instance_connections"):
            found[name] += float(line.rpartition(" ")[2])
    return dict(found)


def summary(samples: list[dict[str, Any]], name: str) -> dict[str, float]:
    """A program's memory and files over the run."""
    at_h = np.array([sample["at_s"] for sample in samples]) / 3600
    mb = np.array([sample[name]["mb"] for sample in samples])
    later = at_h > at_h[-1] / 4
    slope, _ = np.polyfit(at_h[later], mb[later], 1)
    files = [sample[name]["files"] for sample in samples]
    return {
        **{"mb_at_a_quarter": float(mb[later][0]), "mb_at_end": float(mb[-1]), "mb_per_hour": float(slope)},
        **{"files_median": float(np.median(files)), "files_at_end": files[-1]},
        **{"threads_at_end": samples[-1][name]["threads"], "cores": samples[-1][name]["cpu_s"] / samples[-1]["at_s"]},
    }


def main() -> None:
    """Run, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as at:
        told = run(Path(at), arguments.seconds)
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({name: of for name, of in told.items() if name != "samples"}, indent=1))


def run(folder: Path, seconds: float) -> dict[str, Any]:
    """The whole fleet for so long."""
    (plane_port,) = free_ports(1)
    plane = f"http://127.0.0.1:{plane_port}"
    settings = settings_of(CASE, "on-time")
    settings["gateway"] |= {"control_plane": {"url": plane}, "timeouts": {}}
    settings["store"] = {"url": f"sqlite:///{folder / 'kairos.db'}"}
    config, trace = folder / "kairos.yaml", folder / "trace.csv"
    config.write_text(yaml.safe_dump(settings))
    trace.write_text(requests(seconds))
    gateway = f"http://127.0.0.1:{settings['gateway']['port']}"
    faults = [argument for kind, share in FAULTS.items() for argument in ("--fault", f"{kind}:{share}")]
    emulate = ("worker", "emulate", "--config", config, "--whole-fleet", "--control-plane", plane, *faults)
    with (
        running(folder / "service.log", "serve", "--config", config, "--port", plane_port) as service,
        running(folder / "worker.log", *emulate) as worker,
        running(folder / "gateway.log", "gateway", "--config", config) as front,
    ):
        programs = {"gateway": front, "service": service, "emulator": worker}
        wait_for(f"{plane}/healthz", service)
        wait_for(f"{gateway}/health", worker, front)
        wait_for_all(gateway)
        samples = []
        before = {name: cpu_s(each.process) for name, each in programs.items()}
        began_s = time.monotonic()
        with running(
            folder / "load.log", "load", trace, "--fleet", config, "--url", gateway, "--out", folder / "live"
        ) as load:
            while load.process.poll() is None:
                time.sleep(EVERY_S)
                sample: dict[str, Any] = {"at_s": time.monotonic() - began_s}
                for name, each in programs.items():
                    sample[name] = seen(each) | {"cpu_s": cpu_s(each.process) - before[name]}
                samples.append(sample)
        if load.process.returncode:
            raise SystemExit(f"kairos load failed: {(folder / 'load.log').read_text()}")
        left = held(gateway)
    lag = json.loads((folder / "live" / "lag.json").read_text())
    metrics = json.loads((folder / "live" / "summary.json").read_text())["metrics"]
    count = len((folder / "live" / "requests.csv").read_text().splitlines()) - 1
    return {
        "meta": meta("python benchmarks/soak.py"),
        **{"seconds": samples[-1]["at_s"], "per_s": PER_S, "faults": FAULTS, "cores_of_machine": os.cpu_count()},
        **{"requests": count, "problems": lag["problems"], "lag_p99_s": lag["p99_s"]},
        "slo_attainment": metrics["slo_attainment"],
        "held_at_end": left,
        "programs": {name: summary(samples, name) for name in programs},
        "samples": samples[::6],
    }


if __name__ == "__main__":
    main()
