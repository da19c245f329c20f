"""`kairos demo --engine torch`: the live part on a small real model, on a small trace."""

import csv
import json
from pathlib import Path

import pytest
from cli.test_demo import listens, ports, with_data
from command_line import kairos_apart


def test_a_small_model_is_computed_learned_from_and_switched(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with_data(tmp_path)
    asked = ("demo", "--engine", "torch", "--out", "out", "--seconds", "2", "--json")
    told = json.loads(kairos_apart(*asked, cwd=tmp_path, KAIROS_DATA="data"))
    before, after = (
        list(csv.DictReader((tmp_path / "out" / f"live-{strategy}" / "requests.csv").open()))
        for strategy in ("engine-default", "kairos")
    )

    assert {row["status"] for row in before + after} == {"finished"}
    assert [row["prompt_tokens"] for row in before] == [row["prompt_tokens"] for row in after]
    stored = {name: row["requests"] for name, row in told["live"].items()}
    assert stored == {"engine-default@1": len(before), "kairos@1": len(after)}
    assert {kind: row["steps"] > 0 for kind, row in told["errors"].items()} == {"prefill": True, "decode": True}
    assert told["schedule"]["answer"]["prefill"]
    assert [port for port in ports(tmp_path / "out" / "live.yaml") if listens(port)] == []
