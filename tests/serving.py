"""`kairos serve` as a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "kairos.yaml"
PROGRAM = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", "serve", "--config"]
SERVE = [*PROGRAM, str(CONFIG)]


@contextmanager
def served(
    environment: Mapping[str, str] | None = None, config: Path = CONFIG
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A running service on a free port: its address, and the process. Environment None: this process's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sources = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    at_once = {"KAIROS_SERVICE__DRAIN_NOTICE_S": "0"}
    environment = at_once | dict(os.environ if environment is None else environment) | sources
    process = subprocess.Popen(
        [*PROGRAM, str(config), "--port", str(port)], stderr=subprocess.PIPE, text=True, env=environment
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, process.communicate()[1]
            try:
                httpx.get(f"{address}/readyz").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address, process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=20)
