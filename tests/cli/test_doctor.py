"""`kairos doctor`: what the plugins in engines here do."""

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from command_line import kairos

from kairos.adapters.embedded.status import EngineStatus, write


def status(**told: Any) -> EngineStatus:
    now_s = time.time()
    values: dict[str, Any] = {
        "kairos": "0.1.0",
        "engine": "vllm",
        "engine_version": "0.32.0",
        "tested": True,
        "pid": os.getpid(),
        "run": "abc",
        "written_s": now_s,
        "started_s": now_s - 60,
        "profile_id": "h100_m_bf16_1_1_vllm",
        "strategy": "on-time+late+headroom+envelope",
        "step_times": "settings",
        "decides": ["order of waiting prompts"],
        "stops_stalls": True,
        "steps": 12_345,
        "step_p50_s": 0.02,
        "overhead_p50_s": 0.0002,
        "overhead_p99_s": 0.0009,
        "counts": {"yielded prompts": 17},
        "fallbacks": {},
        "control_plane": None,
        "reached_s": None,
        "exchanged": {},
    }
    return EngineStatus(**values | told)


def test_a_plugin_at_work_is_described(tmp_path: Path) -> None:
    write(status(fallbacks={"Mine: PolicyError": 3}), tmp_path)

    ended = kairos("doctor", "--dir", str(tmp_path))

    assert ended.code == 0
    for words in ("vllm 0.32.0", "at work", "on-time+late", "12,345", "200 us a step", "1.0 % of a step", "Mine: Pol"):
        assert words in ended.stdout


def test_where_no_plugin_wrote_it_says_why_that_may_be(tmp_path: Path) -> None:
    ended = kairos("doctor", "--dir", str(tmp_path / "nothing"))

    assert ended.code == 1
    assert "no plugin wrote" in ended.stdout


def test_a_plugin_that_no_longer_writes_is_not_at_work(tmp_path: Path) -> None:
    write(status(written_s=time.time() - 60), tmp_path)

    ended = kairos("doctor", "--dir", str(tmp_path))

    assert ended.code == 1
    assert "NOT at work" in ended.stdout


def test_an_engine_that_nobody_tried_is_marked(tmp_path: Path) -> None:
    write(status(engine_version="0.99.0", tested=False), tmp_path)

    assert "was not run with this version" in kairos("doctor", "--dir", str(tmp_path)).stdout


def test_json_is_the_status_as_it_was_written(tmp_path: Path) -> None:
    written = status()
    write(written, tmp_path)

    (told,) = json.loads(kairos("doctor", "--dir", str(tmp_path), "--json").stdout)

    assert told.pop("is_alive") is True
    assert msgspec.convert(told, EngineStatus) == written


def test_files_of_processes_that_are_gone_are_taken_away(tmp_path: Path) -> None:
    gone = tmp_path / f"{2**22 + 1}-old.json"
    gone.write_text("{}")

    write(status(), tmp_path)

    assert not gone.exists()
