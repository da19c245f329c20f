"""The service as a process: its end, a new configuration, slow clients."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import CONFIG, served

ADDED = "  extra: {prefill: fcfs, prefill_placement: late, decode_placement: headroom, decode: continuous}\n"


def until(holds: Callable[[], bool]) -> None:
    """Return once it holds; fail after ten seconds."""
    ends_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends_s, "it never came to be"
        time.sleep(0.02)


def events(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """The log of a process that ended."""
    return [json.loads(line) for line in process.communicate(timeout=20)[1].splitlines()]


def test_sigterm_gives_notice_ends_what_is_in_flight_and_exits_with_0() -> None:
    with served({"KAIROS_SERVICE__DRAIN_NOTICE_S": "1"}) as (address, process):
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /schedule HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
        with socket.create_connection((host, int(port))) as in_flight:
            in_flight.sendall(head)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{address}/readyz").status_code == 503)
            noticed = httpx.get(f"{address}/readyz").json()["status"]
            still_taken = httpx.get(f"{address}/strategies").status_code
            until(lambda: not reachable(host, int(port)))
            in_flight.sendall(b"{}")
            answer = in_flight.recv(1_000)
        told = events(process)

    assert (noticed, still_taken) == ("draining", 200)
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert process.returncode == 0
    assert [event["event"] for event in told] == ["the service listens", "the service ends"]


def reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_client_that_never_finishes_does_not_hold_the_end_up() -> None:
    with served({"KAIROS_SERVICE__DRAIN_S": "2"}) as (address, process):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as hanging:
            hanging.sendall(b"POST /schedule HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
            httpx.get(f"{address}/healthz")
            began_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=20)

    assert code == 0
    assert time.monotonic() - began_s < 10


def test_a_head_that_does_not_come_closes_the_connection() -> None:
    with served({"KAIROS_SERVICE__CLIENT_TIMEOUT_S": "0.3"}) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            nothing = silent.recv(100)
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            first = b""
            while not first.endswith(b"}"):
                first += slow.recv(1_000)
            slow.sendall(b"GET /healthz HTTP/1.1\r\nhost")
            rest = slow.recv(1_000)

    assert first.startswith(b"HTTP/1.1 200 ")
    assert (nothing, rest) == (b"", b"")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that may be written over, with a store."""
    path = tmp_path / "kairos.yaml"
    path.write_text(CONFIG.read_text() + f"\nstore: {{url: 'sqlite:///{tmp_path}/kairos.db'}}\n")
    return path


def reloaded(address: str, before: object) -> Any:
    """What /readyz says of the reload that comes next."""
    until(lambda: bool(httpx.get(f"{address}/readyz").json()["last_reload"] != before))
    return httpx.get(f"{address}/readyz").json()["last_reload"]


def test_sighup_takes_a_new_configuration_and_refuses_an_invalid_one_whole(config: Path) -> None:
    good = config.read_text()
    with served(config=config) as (address, process):

        def decides(**given: object) -> int:
            body = json.loads((CONFIG.parent / "schedule.json").read_text()) | given
            return httpx.post(f"{address}/schedule", json=body).status_code

        config.write_text(good.replace("strategies:\n", "strategies:\n" + ADDED + "  broken: {prefill: fcsf}\n"))
        process.send_signal(signal.SIGHUP)
        refused = reloaded(address, None)
        unchanged = decides(strategy="extra")
        config.write_text(good.replace("strategies:\n", "strategies:\n" + ADDED).replace("ttft_s: 2.0", "ttft_s: 0.1"))
        process.send_signal(signal.SIGHUP)
        taken = reloaded(address, refused)
        changed = decides(strategy="extra")
        config.write_text(good.replace("url:", "queued_rows: 7, url:"))
        process.send_signal(signal.SIGHUP)
        reloaded(address, taken)
        kinds = [(event["kind"], event["detail"]) for event in httpx.get(f"{address}/events").json()["events"]]
        process.terminate()
        told = events(process)

    assert (refused["taken"], taken["taken"]) == (False, True)
    assert (unchanged, changed) == (404, 200)
    assert [kind for kind, _ in kinds if kind.startswith("configuration")] == [
        *("configuration_taken", "configuration_taken", "configuration_refused")
    ]
    assert kinds[0][1] == {"needs_restart": ["store"]}
    assert "strategies.broken" in next(detail["problem"] for kind, detail in kinds if kind == "configuration_refused")
    assert any(event["event"] == "configuration refused" and event["level"] == "error" for event in told)


def test_requests_go_on_while_configurations_are_taken(config: Path) -> None:
    body = json.loads((CONFIG.parent / "schedule.json").read_text())
    statuses: list[int] = []
    with served(config=config) as (address, process):
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client() as client:
                while not stop.is_set():
                    statuses.append(client.post(f"{address}/schedule", json=body).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        last: object = None
        for _ in range(5):
            process.send_signal(signal.SIGHUP)
            last = reloaded(address, last)
        stop.set()
        asking.join()

    assert len(statuses) > 5
    assert set(statuses) == {200}
