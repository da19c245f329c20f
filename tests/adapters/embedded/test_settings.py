"""What a plugin is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from kairos.adapters.embedded.settings import EngineSettings, load_settings
from kairos.scheduler_core.domain import Line, LinearStepTimes, Profile
from kairos.scheduler_core.errors import ConfigError

PROFILE = Profile("h100", "m", engine="vllm")


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings({"KAIROS_DATA": "/data", "PATH": "/bin"}) == EngineSettings()


def test_variables_stand_above_the_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("ttft_s: 1.5\ntpot_s: 0.02\nclasses:\n  batch: {ttft_s: 30, tpot_s: null}\n")

    found = load_settings({"KAIROS_ENGINE_CONFIG": str(file), "KAIROS_ENGINE_TPOT_S": "4e-2"})

    assert (found.ttft_s, found.tpot_s) == (1.5, 0.04)
    assert found.targets("batch") == (30.0, float("inf"))
    assert found.targets("unheard of") == (1.5, 0.04)


def test_coefficients_become_step_times() -> None:
    told = "{prefill: {a_s: 0.01, b_s: 1e-4}, decode: {a_s: 0.008}}"

    found = load_settings({"KAIROS_ENGINE_LINEAR": told}).step_times(PROFILE)

    assert found == LinearStepTimes(Line(0.01, 1e-4, 0.0), Line(0.008, 0.0, 0.0))


def test_with_no_step_times_the_hardware_speaks() -> None:
    assert EngineSettings().step_times(PROFILE).decode_step_s(8, 8_000) > 0


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"KAIROS_ENGINE_TTFT": "1"}, "KAIROS_ENGINE_TTFT sets nothing"),
        ({"KAIROS_ENGINE_TTFT_S": "soon"}, "ttft_s"),
        ({"KAIROS_ENGINE_TTFT_S": "-1"}, "ttft_s"),
        ({"KAIROS_ENGINE_LONGEST_HOLD_S": "25"}, "longest_hold_s"),
        ({"KAIROS_ENGINE_CONFIG": "/nowhere/engine.yaml"}, "/nowhere/engine.yaml"),
        ({"KAIROS_ENGINE_LINEAR": "{prefill: {a_s: 1}, decode: {a_s: 1}}", "KAIROS_ENGINE_MODEL": "m"}, "not both"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_it(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_settings(environment)


def test_coefficients_that_take_no_time_are_refused() -> None:
    settings = load_settings({"KAIROS_ENGINE_LINEAR": "{prefill: {}, decode: {a_s: 1}}"})

    with pytest.raises(ConfigError, match="must take time"):
        settings.step_times(PROFILE)


def test_every_setting_is_on_the_page_of_engines() -> None:
    page = (Path(__file__).parents[3] / "docs" / "engines.md").read_text()

    assert [name for name in EngineSettings.__struct_fields__ if f"`{name}`" not in page] == []


NEEDS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
import kairos.adapters.vllm.scheduler, kairos.adapters.vllm.forward_pass
print("loaded")
"""


def test_the_plugin_loads_where_only_the_base_is_installed(tmp_path: Path) -> None:
    absent = ["pydantic", "sqlalchemy", "httpx", "fastapi", "typer", "scipy", "lightgbm", "sklearn", "jinja2", "rich"]

    ended = subprocess.run([sys.executable, "-c", NEEDS, *absent], cwd=tmp_path, capture_output=True, text=True)

    assert ended.stdout == "loaded\n", ended.stderr
