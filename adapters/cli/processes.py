"""Kairos's own programs as processes on the loopback: started, waited for, and ended with whoever started them."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from kairos.scheduler_core.errors import KairosError

_START_LIMIT_S = 120.0
_END_LIMIT_S = 30.0
_PROGRAM = (sys.executable, "-c", "from kairos.adapters.cli import main; main()")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now, no two alike."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


@dataclass(frozen=True, slots=True)
class Started:
    """A program that was started, and where its words go."""

    process: "subprocess.Popen[bytes]"
    log: Path


@contextmanager
def running(log: Path, *arguments: object) -> Iterator[Started]:
    """`kairos ARGUMENTS`, ended by SIGTERM at the end; what it says goes to a file.

    It is in a process group of its own: Ctrl-C reaches it through whoever started it, in order.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [*_PROGRAM, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
        )
    try:
        yield Started(process, log)
    finally:
        process.terminate()
        try:
            process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when Ctrl-C comes a second time
            process.kill()
            process.wait()


def wait_for(url: str, *needed: Started) -> None:
    """Wait until an address answers with 200, which needs some programs.

    Raises:
        KairosError: one of them ended, or it did not answer in time.
    """
    until_s = time.monotonic() + _START_LIMIT_S
    while True:
        for each in needed:
            if each.process.poll() is not None:
                raise KairosError(f"a program ended before {url} answered; its last words are in {each.log}")
        if time.monotonic() > until_s:
            raise KairosError(f"{url} did not answer in {_START_LIMIT_S:.0f} s; see {needed[-1].log}")
        try:
            if httpx.get(url, timeout=2.0, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
