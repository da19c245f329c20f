"""`kairos serve` as a process, asked over HTTP; and that docs/rest.md shows what one gets."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from service.snapshots import prefill, snapshot, waits
from serving import SERVE, served

import kairos
from kairos.scheduler_core.service import schemas
from kairos.scheduler_core.telemetry import RequestRow, StepRow

ROOT = Path(kairos.__file__).parents[2]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A running server, on a free port."""
    with served() as (address, _):
        yield address


def test_a_server_answers_a_snapshot_over_http(url: str) -> None:
    response = httpx.post(f"{url}/schedule", content=(ROOT / "examples" / "schedule.json").read_bytes())

    assert response.status_code == 200
    assert [entry["request_id"] for entry in response.json()["prefill"]] == ["r3", "r4", "r2"]


def test_without_now_s_the_servers_clock_counts(url: str) -> None:
    fleet = prefill(profile="qwen3-32b-b300-tp4")
    body = {"instances": [fleet], "waiting": [waits("a", arrival_s=time.time() - 1.0)]}

    waited_s = httpx.post(f"{url}/schedule", json=body).json()["prefill"][0]["reason"]["waited_s"]

    assert 1.0 <= waited_s < 10.0


def test_ten_thousand_requests_are_answered_while_others_are_served(url: str) -> None:
    fleet = [prefill(f"prefill-{n}", profile="qwen3-32b-b300-tp4", chunk_tokens=8192) for n in range(2)]
    body = snapshot(*fleet, waiting=[waits(n, 50 + (7 * n) % 3_000, -0.001 * n) for n in range(10_000)])

    answer = httpx.post(f"{url}/schedule", json=body, timeout=60).json()

    assert len(answer["prefill"]) == 10_000


def test_a_wrong_body_is_a_problem_over_http_too(url: str) -> None:
    response = httpx.post(f"{url}/schedule", json={"instances": [{}]})

    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")


def test_the_example_asks_and_prints_what_the_page_shows(url: str) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "ask_schedule.py"),
        str(ROOT / "examples" / "schedule.json"),
        url,
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert printed in (ROOT / "docs" / "rest.md").read_text()


def test_an_address_that_others_reach_is_refused_with_exit_code_2() -> None:
    ended = subprocess.run([*SERVE, "--host", "0.0.0.0"], capture_output=True, text=True, env=dict(os.environ))

    assert ended.returncode == 2
    assert ended.stderr == (
        "kairos: host '0.0.0.0' is open to other machines, and the service has no keys; "
        "use 127.0.0.1, or make a key with kairos keys add\n"
    )


@pytest.mark.parametrize(
    "struct",
    [
        schemas.Snapshot,
        schemas.Instance,
        schemas.WaitingRequest,
        schemas.RunningRequest,
        schemas.TransferredRequest,
        schemas.ResidentRequest,
        schemas.EndedStep,
        schemas.Answer,
        schemas.PrefillAnswer,
        schemas.PrefillReason,
        schemas.DecodeAnswer,
        schemas.DecodeReason,
        schemas.Rejection,
        schemas.Problem,
        schemas.TelemetryAnswer,
        StepRow,
        RequestRow,
    ],
    ids=lambda struct: struct.__name__,
)
def test_every_field_is_on_the_page(struct: type) -> None:
    page = (ROOT / "docs" / "rest.md").read_text()

    missing = [field for field in struct.__struct_fields__ if not re.search(rf"`{field}`", page)]  # type: ignore[attr-defined]
    assert missing == []
