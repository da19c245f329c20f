"""Attainment of a live fleet beside what `kairos simulate` says of it: the simulator checked by the live system.

Four prefill and four decode instances are emulated at real speed (`kairos worker emulate`, one process), with the
gateway in front of them (`kairos gateway`) and a trace sent through it at its recorded times (`kairos load`). The same
file, trace and targets are then simulated. A run is void when the generator was more than 20 ms late at p99.

    python benchmarks/live_against_simulated.py --seconds 120 --out /tmp/short.json
    python benchmarks/live_against_simulated.py             # 900 s of both traces, about half an hour
"""

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from record import meta

from kairos.adapters.cli.processes import free_ports, running, wait_for

INSTANCES = 4
LAG_LIMIT_S = 0.02
GOAL_PP = 3.0
METRICS = ("ttft_attainment", "tpot_attainment", "slo_attainment")

PROFILES: dict[str, Any] = {
    "llama-2-70b-h100-tp8": {
        **{"gpu": "H100-80GB-SXM", "model": "meta-llama/Llama-2-70b", "precision": "fp16", "tp": 8, "engine": "vllm"},
        "step_times": {
            "linear": {
                "prefill": {"a_s": 1.9e-2, "b_s": 6.9e-5, "c_s": 1.8e-9},
                "decode": {"a_s": 3.0e-2, "b_s": 2.0e-4, "c_s": 2.0e-7},
            }
        },
    },
    "llama-2-70b-a100-tp2": {
        **{"gpu": "A100-80GB-SXM", "model": "meta-llama/Llama-2-70b", "precision": "fp16", "tp": 2, "engine": "vllm"},
        "step_times": {
            "linear": {
                "prefill": {"a_s": 3.0e-2, "b_s": 4.5e-4, "c_s": 8.0e-9},
                "decode": {"a_s": 4.4e-2, "b_s": 4.0e-4, "c_s": 1.0e-7},
            }
        },
    },
}
"""The first as `h100.yaml` has it, the second by arithmetic: FLOPs at half of the peak, bytes at 80 % of it."""

PLACES = {"prefill_placement": "late", "decode_placement": "headroom", "decode": "continuous"}
STRATEGIES: dict[str, Any] = {name: {"prefill": name, **PLACES} for name in ("on-time", "fcfs")}


@dataclass(frozen=True)
class Case:
    """One trace, and hardware for which it is neither little nor too much as recorded."""

    trace: str
    profile: str
    chunk_tokens: int
    kv_tokens: int
    ttft_s: float
    tpot_s: float
    jitter_s: float = 0.0


CASES = (
    Case("azure2023_code", "llama-2-70b-a100-tp2", 2048, 60_000, 5.0, 0.1),
    Case("mooncake_conversation", "llama-2-70b-h100-tp8", 2048, 1_200_000, 10.0, 0.15, jitter_s=3.0),
)


def settings_of(case: Case, strategy: str) -> dict[str, Any]:
    """The kairos.yaml of worker, gateway and simulator, on free ports."""
    *ports, port = free_ports(2 * INSTANCES + 1)
    urls = iter([f"http://127.0.0.1:{each}" for each in ports])
    group = {"profile": case.profile, "engine": "vllm", "control": "gateway"}
    prefill = group | {"chunk_tokens": case.chunk_tokens}
    decode = group | {"kv_tokens": case.kv_tokens}
    return {
        "profiles": {case.profile: PROFILES[case.profile]},
        "fleet": {
            "prefill": [prefill | {"url": next(urls)} for _ in range(INSTANCES)],
            "decode": [decode | {"url": next(urls)} for _ in range(INSTANCES)],
            "kv_transfer": {"bytes_per_token": 327680, "bytes_per_s": 25e9, "latency_s": 0.002},
            "handover": {"first_token": "decode", "place_decode": "at_first_token"},
        },
        "slo": {"classes": {"default": {"ttft_s": case.ttft_s, "tpot_s": case.tpot_s}}},
        "strategies": STRATEGIES,
        "active": strategy,
        "gateway": {"port": port, "timeouts": {"total_s": 7200, "first_token_s": 7200}},
    }


def live(case: Case, strategy: str, seconds: float, traces: Path, folder: Path) -> dict[str, float]:
    """One strategy on one trace, live; the cores that emulator and gateway took."""
    folder.mkdir(parents=True)
    settings = settings_of(case, strategy)
    config = folder / "kairos.yaml"
    config.write_text(yaml.safe_dump(settings))
    address = f"http://127.0.0.1:{settings['gateway']['port']}"
    trace = replayed(case, seconds, traces, folder)
    with (
        running(folder / "worker.log", "worker", "emulate", "--config", config, "--whole-fleet") as worker,
        running(folder / "gateway.log", "gateway", "--config", config) as gateway,
    ):
        wait_for(f"{address}/health", worker, gateway)
        wait_for_all(address)
        before = {name: cpu_s(each.process) for name, each in (("emulator", worker), ("gateway", gateway))}
        began_s = time.monotonic()
        with running(folder / "load.log", "load", *trace, "--url", address, "--out", folder / "live") as generator:
            if generator.process.wait() != 0:
                raise SystemExit(f"kairos load failed: {(folder / 'load.log').read_text()}")
        took_s = time.monotonic() - began_s
        return {
            name: (cpu_s(each.process) - before[name]) / took_s
            for name, each in (("emulator", worker), ("gateway", gateway))
        }


def replayed(case: Case, seconds: float, traces: Path, folder: Path) -> list[object]:
    """What `kairos load` and `kairos simulate` are both told."""
    trace = traces / f"{case.trace}.csv.gz"
    return [trace, "--fleet", folder / "kairos.yaml", "--duration", seconds, "--jitter", case.jitter_s]


def simulated(case: Case, seconds: float, traces: Path, folder: Path) -> None:
    """The same, simulated."""
    log = folder / "simulate.log"
    with running(log, "simulate", *replayed(case, seconds, traces, folder), "--out", folder / "simulated") as started:
        if started.process.wait() != 0:
            raise SystemExit(f"kairos simulate failed: {log.read_text()}")


def compared(case: Case, strategy: str, seconds: float, folder: Path, cores: dict[str, float]) -> dict[str, Any]:
    """What both say, and where single requests differ."""
    figures = {
        kind: json.loads((folder / kind / "summary.json").read_text())["metrics"] for kind in ("live", "simulated")
    }
    lag = json.loads((folder / "live" / "lag.json").read_text())
    rows = {kind: list(csv.DictReader((folder / kind / "requests.csv").open())) for kind in ("live", "simulated")}
    pairs = list(zip(rows["live"], rows["simulated"], strict=True))
    told = {kind: {m: 100 * figures[kind][m] for m in METRICS} | spread(figures[kind]) for kind in figures}
    difference = {m: told["live"][m] - told["simulated"][m] for m in METRICS}
    return {
        "trace": case.trace,
        "strategy": strategy,
        "seconds": seconds,
        "target": f"fixed:{case.ttft_s:g}/tpot:{case.tpot_s:g}",
        "requests": len(pairs),
        **told,
        "difference_pp": difference,
        "agree": all(abs(points) <= GOAL_PP for points in difference.values()),
        "same_outcome_percent": 100 * sum(a["slo_met"] == b["slo_met"] for a, b in pairs) / len(pairs),
        "lag_p99_s": lag["p99_s"],
        "void": lag["p99_s"] > LAG_LIMIT_S,
        "problems": lag["problems"],
        "cores": cores,
    }


def spread(metrics: dict[str, Any]) -> dict[str, float]:
    """Medians and tails."""
    return {f"{name}_{q}": metrics[name][q] for name in ("ttft_s", "tpot_s") for q in ("p50", "p99")}


def wait_for_all(address: str) -> None:
    """Wait until the gateway has found every engine well."""
    import httpx

    while True:
        told = httpx.get(f"{address}/health").json()["instances"].values()
        if all(instance["state"] == "ready" for instance in told):
            return
        time.sleep(0.1)


def cpu_s(process: "subprocess.Popen[bytes]") -> float:
    """Seconds of CPU of a process and its threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900.0, help="of each trace")
    parser.add_argument("--traces", nargs="+", default=[case.trace for case in CASES])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--together", type=int, default=2, help="fleets at a time")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KAIROS_DATA", ".")) / "traces")
    parser.add_argument("--files", type=Path, help="keep the files of every run here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "live_against_simulated.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.together) as pool:
        files = arguments.files or Path(name)
        wanted = [
            (c, s, files / f"{c.trace}-{s}") for s in arguments.strategies for c in CASES if c.trace in arguments.traces
        ]
        began = [pool.submit(live, case, s, arguments.seconds, arguments.data, folder) for case, s, folder in wanted]
        cores = [each.result() for each in began]
        for case, _, folder in wanted:
            simulated(case, arguments.seconds, arguments.data, folder)
        rows = [
            compared(case, s, arguments.seconds, folder, of)
            for (case, s, folder), of in zip(wanted, cores, strict=True)
        ]
    told = {"meta": meta("python benchmarks/live_against_simulated.py"), "profiles": PROFILES, "rows": rows}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
