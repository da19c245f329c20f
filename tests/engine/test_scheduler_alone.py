"""The plugin in vLLM's own scheduler, with made-up model outputs, on every version that it was run with."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engine.engines import ENGINES, ROOT, VERSIONS, python_of

pytestmark = pytest.mark.engine

ONLY_ITS_SOURCES = "0.33.0"
"""No build for CPUs: its scheduler runs on the libraries of the version before it."""


def sources_of(version: str) -> Path:
    """The unpacked Python sources of a vLLM."""
    folder = ENGINES / f"sources-{version}"
    if not (folder / "vllm" / "version.py").exists():
        subprocess.run([ROOT / "tests" / "engine" / "sources", "vllm", version, folder], check=True)
    return folder


@pytest.fixture(scope="module", params=(*VERSIONS, ONLY_ITS_SOURCES))
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What every scenario saw."""
    paths, version = [str(ROOT / "tests" / "engine" / "inside")], request.param
    if version == ONLY_ITS_SOURCES:
        paths.insert(0, str(sources_of(version)))
        version = VERSIONS[-1]
    ended = subprocess.run(
        [python_of(version), ROOT / "tests" / "engine" / "inside" / "alone.py"],
        env={k: v for k, v in os.environ.items() if not k.startswith("KAIROS_ENGINE_")}
        | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert told["version"].partition("+")[0] == request.param
    return told


def test_waiting_prompts_start_in_the_order_of_the_policy(seen: dict[str, Any]) -> None:
    assert list(seen["order"]["first_step"]) == ["urgent", "middle"]
    assert seen["order"]["by_first_token"] == ["urgent", "middle", "slow"]


def test_short_prompts_overtake_queued_long_ones(seen: dict[str, Any]) -> None:
    assert seen["overtaking"]["last_short_s"] < 0.5
    assert seen["overtaking_stock"]["last_short_s"] > 1.5


@pytest.mark.parametrize("scenario", ["chunk_yield", "chunk_yield_async"])
def test_a_running_prompt_yields_at_a_chunk_end_and_keeps_what_it_has_computed(
    seen: dict[str, Any], scenario: str
) -> None:
    found = seen[scenario]

    assert [list(step) for step in found["while_yielding"]] == [["urgent"], ["urgent"]]
    assert found["kept"] == found["computed"] == 16 * found["kept_blocks"]
    assert found["counts"]["yielded prompts"] == 2
    assert found["prompt_tokens"] == {"long": 3000 + 3, "urgent": 900 + 3}
    assert not found["preempted"]


@pytest.mark.parametrize("scenario", ["load", "load_async", "pressure", "pressure_async"])
def test_of_500_requests_with_aborts_none_is_lost_and_nothing_stays_behind(seen: dict[str, Any], scenario: str) -> None:
    found = seen[scenario]

    assert found["ended"]
    assert found["aborted"] > 20
    assert found["short"] == []
    assert found["kv_used"] == 0
    assert found["left_in_view"] == [0, 0, 0, 0]
    assert found["context_left"] == found["unfinished_shapes"] == 0


def test_where_kv_runs_out_vllm_preempts_and_all_come_through(seen: dict[str, Any]) -> None:
    assert seen["pressure"]["preempted"] > 0
    assert seen["pressure"]["counts"]["preemptions"] == seen["pressure"]["preempted"]


@pytest.mark.parametrize(
    ("scenario", "how"),
    [("raises", "Raises: RuntimeError"), ("invents", "Invents: PolicyError"), ("stalls", "Stalls: DecisionTimeout")],
)
def test_a_policy_that_fails_leaves_the_steps_of_stock_vllm(seen: dict[str, Any], scenario: str, how: str) -> None:
    assert seen[scenario]["as_stock"]
    assert seen[scenario]["fallbacks"][how] == seen[scenario]["counts"]["prefill fallback"] > 0


def test_a_policy_that_damages_what_it_is_shown_leaves_the_steps_of_stock_vllm(seen: dict[str, Any]) -> None:
    assert seen["worst"]["as_stock"]
    assert seen["worst"]["counts"]["views made anew"] > 0


def test_a_damaged_view_is_made_anew(seen: dict[str, Any]) -> None:
    assert seen["broken_view"]["ended"]
    assert seen["broken_view"]["outputs"] == [20]
    assert seen["broken_view"]["counts"]["views made anew"] == 1


def test_prompt_tokens_beside_decodes_follow_their_slack(seen: dict[str, Any]) -> None:
    tight, loose = seen["slack_tight"], seen["slack_loose"]

    assert tight["tpot_s"] <= 0.02 < loose["tpot_s"] <= 0.1
    assert max(tight["chunks"][3:]) < 200 < 2000 < loose["chunks"][0]
    assert set(tight["decoding"]) == {4}
    assert seen["slack_none"]["chunks"][0] == 2048 - 4


def test_tight_requests_keep_their_pace_near_capacity_at_the_cost_of_nobody(seen: dict[str, Any]) -> None:
    assert seen["two_paces_stock"]["tight"] < 0.5
    assert seen["two_paces"] == {"ended": True, "tight": 1.0, "relaxed": 1.0, "ttft": 1.0}
    assert seen["two_paces_large_blocks"] == seen["two_paces"]


def test_relaxed_requests_sit_out_steps_that_the_tight_ones_need_short(seen: dict[str, Any]) -> None:
    found = seen["participation"]

    assert found["ended"]
    assert found["counts"]["held decodes"] > 100
    assert 1 <= found["relaxed_beside_tight"] < 20
    assert found["outputs"] == [60]


def test_nothing_is_held_for_a_request_that_has_no_room(seen: dict[str, Any]) -> None:
    assert seen["no_room"]["ended"]
    assert seen["no_room"]["preempted"] == 0


def test_strategy_and_step_times_change_while_requests_run(seen: dict[str, Any]) -> None:
    found = seen["news"]

    assert found["ended"]
    assert found["strategy"].startswith("theirs (edf")
    assert found["step_times"] == "control plane, model 7"
    assert found["seconds_per_token"] > 1e-3
    assert found["outputs"] == [30]
