"""The program `kairos`: what it printed where, and how it ended."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from kairos.adapters.cli import main


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def kairos(*arguments: object) -> Ended:
    """Run `kairos ARGUMENTS` as the console script does."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    code: object = 0
    sys.argv = ["kairos", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return Ended(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def kairos_apart(*arguments: object, cwd: Path, **environment: str) -> str:
    """What `kairos ARGUMENTS` prints on stdout in a process of its own, in a folder; it must succeed."""
    program = [sys.executable, "-c", "from kairos.adapters.cli import main; main()", *map(str, arguments)]
    ended = subprocess.run(program, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{arguments}: {ended.stderr}"
    return ended.stdout
