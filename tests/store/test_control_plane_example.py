"""The example that tells the life of a model runs, on both databases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import kairos

from kairos.scheduler_core.service.store.session import Store

EXAMPLE = Path(__file__).parents[2] / "examples" / "control_plane.py"


def test_the_example_goes_from_telemetry_to_a_rollback(empty: Store, url: str) -> None:
    goes_from_telemetry_to_a_rollback(empty, url)


@pytest.mark.skipif("KAIROS_DATA" not in os.environ, reason="KAIROS_DATA is not set")
def test_the_example_goes_from_measured_telemetry_to_a_rollback(empty: Store, url: str) -> None:
    goes_from_telemetry_to_a_rollback(empty, url, "--telemetry", f"{os.environ['KAIROS_DATA']}/telemetry")


def goes_from_telemetry_to_a_rollback(empty: Store, url: str, *options: str) -> None:
    if not empty.embedded:
        assert kairos("db", "upgrade", "--url", url).code == 0
    source = str(EXAMPLE.parents[1] / "src")
    told = subprocess.run(
        [sys.executable, str(EXAMPLE), "--database", url, *options],
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"PYTHONPATH": source},
    )

    assert told.returncode == 0, told.stdout + told.stderr
    assert "the drift test noticed" in told.stdout
    assert "was promoted in place of" in told.stdout
    assert "was refused: champion kept" in told.stdout
    assert "rolled back from" in told.stdout
