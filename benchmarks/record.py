"""What every results file says of how it was made."""

import os
import platform
import subprocess
from collections.abc import Iterable


def meta(command: str, seeds: Iterable[int] = ()) -> dict[str, object]:
    """Commit, machine, command and seeds."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"commit": commit, "machine": machine, "command": command, "seeds": list(seeds)}
