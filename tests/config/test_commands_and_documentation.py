"""`kairos config ...`, its JSON schema, and that docs/configuration.md names every setting."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kairos.adapters.cli import configuration
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.errors import ConfigError

ROOT = Path(__file__).parents[2]

app = typer.Typer()
configuration.register(app)
run = CliRunner().invoke


def test_a_valid_file_is_said_to_be_valid_with_what_it_holds() -> None:
    result = run(app, ["config", "check", str(ROOT / "examples" / "kairos.yaml")])

    assert result.exit_code == 0
    assert "valid: 2 prefill, 2 decode instances; strategies engine-default, tuned" in result.stdout


def test_the_settings_in_force_are_printed_as_json() -> None:
    result = run(app, ["config", "check", str(ROOT / "examples" / "kairos.yaml"), "--json"])

    assert json.loads(result.stdout)["fleet"]["decode"][0]["kv_tokens"] == 1_200_000


def test_an_invalid_file_is_raised_as_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "kairos.yaml").write_text("fleet: {}")

    result = run(app, ["config", "check", str(tmp_path / "kairos.yaml")])

    assert isinstance(result.exception, ConfigError)


def test_the_schema_takes_a_policy_as_a_name_or_a_mapping() -> None:
    schema = json.loads(run(app, ["config", "schema"]).stdout)

    assert [option["type"] for option in schema["$defs"]["PolicySlot"]["anyOf"]] == ["string", "object"]


def settings_of(schema: dict[str, Any]) -> Iterator[str]:
    yield from schema["properties"]
    for definition in schema["$defs"].values():
        yield from definition.get("properties", {})


@pytest.mark.parametrize("setting", sorted(set(settings_of(Settings.model_json_schema()))))
def test_every_setting_is_in_the_documentation(setting: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()

    assert re.search(rf"`{re.escape(setting)}`", text), f"docs/configuration.md does not name `{setting}`"
