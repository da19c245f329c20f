"""KAIROS_SECTION__KEY: every setting of the file can be overridden, and a mistake names its variable."""

from pathlib import Path

import pytest

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import ConfigError

TEXT = """
profiles:
  qwen3-32b.b300: {gpu: g, model: m, step_times: {linear: {prefill: {b_s: 1.0e-5}, decode: {a_s: 0.01}}}}
fleet:
  prefill: [{profile: qwen3-32b.b300}, {profile: qwen3-32b.b300}]
  decode: [{profile: qwen3-32b.b300}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kairos.yaml"
    path.write_text(TEXT)
    return path


def load(file: Path, **environ: str) -> Settings:
    return load_settings(file, environ)


def test_a_setting_that_the_file_leaves_out_can_be_set(file: Path) -> None:
    assert load(file, KAIROS_GUARDS__DECISION_BUDGET_S="1e-2").guards.decision_budget_s == 0.01


def test_a_group_of_the_fleet_is_found_by_its_index(file: Path) -> None:
    prefill = load(file, KAIROS_FLEET__PREFILL__1__COUNT="7").fleet.prefill

    assert [group.count for group in prefill] == [1, 7]


def test_a_name_with_other_signs_is_found_with_underscores_for_them(file: Path) -> None:
    settings = load(file, KAIROS_PROFILES__QWEN3_32B_B300__TP="4", KAIROS_STRATEGIES__ENGINE_DEFAULT__DECODE="capped")

    assert settings.profiles["qwen3-32b.b300"].tp == 4
    assert settings.strategies["engine-default"].decode.name == "capped"
    assert settings.strategies["engine-default"].prefill.name == "fcfs"


def test_a_parameter_of_a_shipped_policy_is_changed_for_this_process_only(file: Path) -> None:
    changed = load(file, KAIROS_STRATEGIES__TUNED__DECODE__H="0.8")

    assert changed.strategies["tuned"].decode.params == {"h": 0.8}
    assert load(file).strategies["tuned"].decode.params == {"h": 0.9}


def test_a_whole_section_can_be_given_as_yaml(file: Path) -> None:
    settings = load(file, KAIROS_FLEET__DECODE="[{profile: qwen3-32b.b300, count: 3}]", KAIROS_ACTIVE="paper")

    assert (settings.fleet.decode[0].count, settings.active) == (3, "paper")


def test_a_null_takes_a_value_away(file: Path) -> None:
    assert load(file, KAIROS_SLO__CLASSES__DEFAULT__TPOT_S="null").slo.classes["default"].tpot_s is None


def test_variables_of_others_are_left_alone(file: Path) -> None:
    others = load(file, KAIROS_DATA="/somewhere", KAIROS_LOG_LEVEL="debug", PATH="x", NOT_KAIROS_GUARDS__X="1")

    assert others == load(file)


def test_the_environment_alone_can_hold_everything() -> None:
    profiles = "{p: {gpu: g, model: m}}"
    fleet = "{prefill: [{profile: p}], decode: [{profile: p}]}"

    settings = load_settings(None, {"KAIROS_PROFILES": profiles, "KAIROS_FLEET": fleet})

    assert settings.fleet.decode[0].profile == "p"


def test_no_file_and_no_variables_say_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="environment: profiles: is missing; fleet: is missing"):
        load_settings(None, {})


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("KAIROS_GAURDS__DEFERRED_SHARE", "0.1", "gaurds: unknown setting. Did you mean 'guards'?"),
        (
            "KAIROS_GUARDS__DEFERED_SHARE",
            "0.1",
            "guards.defered_share: unknown setting. Did you mean",
        ),
        ("KAIROS_GUARDS__DEFERRED_SHARE", "lots", "guards.deferred_share: a number is expected, got 'lots'"),
        ("KAIROS_FLEET__PREFILL__2__COUNT", "1", "there is no '2' in fleet.prefill"),
        ("KAIROS_FLEET__PREFILL__X__COUNT", "1", "there is no 'x' in fleet.prefill"),
        ("KAIROS_ACTIVE__NAME", "x", "active: input should be a valid string"),
        ("KAIROS_GUARDS", "[1", "line 1"),
    ],
)
def test_a_mistake_names_its_variable(file: Path, variable: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(file, **{variable: value})

    assert told in str(raised.value)
    assert variable in str(raised.value)
