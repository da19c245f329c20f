"""`kairos gateway` and `kairos worker emulate` as processes, as a user runs them."""

import os
import signal
import sqlite3
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml
from command_line import kairos
from gateways import free_ports, process, wait_for
from serving import served

EXAMPLE = Path(__file__).parents[3] / "examples" / "gateway.yaml"
ASKED = {"model": "Qwen/Qwen3-32B", "prompt": "hello there", "max_tokens": 5}


def test_workers_a_gateway_and_a_control_plane_work_together_as_processes(tmp_path: Path) -> None:
    prefill, decode, front = free_ports(3)
    database = tmp_path / "kairos.db"
    assert kairos("db", "upgrade", "--url", f"sqlite:///{database}").code == 0
    with ExitStack() as stack:
        url, _ = stack.enter_context(served(os.environ | {"KAIROS_STORE__URL": f"sqlite:///{database}"}))
        document = yaml.safe_load(EXAMPLE.read_text())
        document["fleet"]["prefill"][0]["url"] = f"http://127.0.0.1:{prefill}"
        document["fleet"]["decode"][0]["url"] = f"http://127.0.0.1:{decode}"
        document["gateway"] = {"port": front, "control_plane": {"url": url}, "timeouts": {"drain_s": 5}}
        config = tmp_path / "kairos.yaml"
        config.write_text(yaml.safe_dump(document))
        for role, port in (("prefill", prefill), ("decode", decode)):
            options = ("--role", role, "--port", port, "--control-plane", url)
            stack.enter_context(process("worker", "emulate", "--config", config, *options))
        gateway = stack.enter_context(process("gateway", "--config", config))
        wait_for(f"http://127.0.0.1:{front}/health")

        answer = httpx.post(f"http://127.0.0.1:{front}/v1/completions", json=ASKED)
        config.write_text("nonsense: 1")
        gateway.send_signal(signal.SIGHUP)
        wait_for(f"http://127.0.0.1:{front}/health")
        again = httpx.post(f"http://127.0.0.1:{front}/v1/completions", json=ASKED)
    with sqlite3.connect(database) as rows:
        steps, requests = (
            rows.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("steps", "requests")
        )

    assert answer.json()["choices"][0]["text"] == again.json()["choices"][0]["text"] == " t1 t2 t3 t4 t5"
    assert (steps, requests) == (12, 2), "two prefill steps, ten decode steps"


def test_a_whole_fleet_in_one_process_serves_a_trace_that_is_sent_to_its_gateway(tmp_path: Path) -> None:
    *workers, front = free_ports(3)
    document = yaml.safe_load(EXAMPLE.read_text())
    for role, port in zip(("prefill", "decode"), workers, strict=True):
        document["fleet"][role][0]["url"] = f"http://127.0.0.1:{port}"
    document["gateway"] = {"port": front}
    (tmp_path / "kairos.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,900,3\n0.2,50,1\n0.3,4000,2\n")
    options = ("--fleet", tmp_path / "kairos.yaml", "--url", f"http://127.0.0.1:{front}", "--out", tmp_path / "live")
    with ExitStack() as stack:
        stack.enter_context(process("worker", "emulate", "--config", tmp_path / "kairos.yaml", "--whole-fleet"))
        stack.enter_context(process("gateway", "--config", tmp_path / "kairos.yaml"))
        wait_for(f"http://127.0.0.1:{front}/health")

        ended = kairos("load", tmp_path / "trace.csv", *options)

    assert ended.code == 0
    assert "both  met 100.0 %" in ended.stdout
    assert {path.name for path in (tmp_path / "live").iterdir()} == {"requests.csv", "summary.json", "lag.json"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gateway", "--config", "{example}", "--host", "0.0.0.0"), "give keys"),
        (("gateway", "--config", "{simulated}"), "no group of the fleet has a url"),
        (("worker", "emulate", "--config", "{simulated}", "--whole-fleet"), "no group of the fleet has a url"),
        (("worker", "emulate", "--config", "{example}", "--role", "mixed"), "fleet.mixed has 0 groups"),
        (("worker", "emulate", "--config", "{example}", "--role", "prefill", "--fault", "boom:1"), "write KIND:SHARE"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(arguments: tuple[str, ...], said: str) -> None:
    places = {"example": EXAMPLE, "simulated": EXAMPLE.with_name("kairos.yaml")}

    ended = kairos(*(argument.format(**places) for argument in arguments))

    assert ended.code == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
