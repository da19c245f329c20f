"""The built-in fleets, and fleets by path."""

from pathlib import Path

import pytest

from kairos.adapters.simulator.fleets import fleet_names, load_fleet
from kairos.scheduler_core.config import ProfileSettings, Settings
from kairos.scheduler_core.domain import Line, LinearStepTimes
from kairos.scheduler_core.errors import ConfigError, UnknownNameError


def step_times(settings: Settings) -> LinearStepTimes:
    profile: ProfileSettings
    (profile,) = settings.profiles.values()
    assert profile.step_times is not None
    assert profile.step_times.linear is not None
    return profile.step_times.linear.as_step_times()


def test_the_papers_frame_is_that_of_algorithms_section_5() -> None:
    settings = load_fleet("paper", {})

    assert step_times(settings).prefill == Line(0.0, 4.77e-5, 2.98e-10)
    assert step_times(settings).decode_step_s(batch_size=1, sum_context_tokens=0) == pytest.approx(9.0e-3)
    assert step_times(settings).decode == Line(8.9e-3, 1e-4, 2.44e-7)
    assert [(g.count, g.chunk_tokens) for g in settings.fleet.prefill] == [(1, 8192)]
    assert [g.count for g in settings.fleet.decode] == [1]
    assert (settings.slo.classes["default"].ttft_s, settings.slo.classes["default"].tpot_s) == (8.0, 0.05)


@pytest.mark.parametrize(
    ("name", "prefill", "decode", "chunk_tokens"),
    [
        ("b300", Line(8.2e-3, 1.48e-5, 3.9e-10), Line(5.9e-3, 3.1e-5, 1.0e-8), 8192),
        ("h100", Line(1.9e-2, 6.9e-5, 1.8e-9), Line(3.0e-2, 2.0e-4, 2.0e-7), 2048),
    ],
)
def test_the_fitted_fleets_have_four_instances_a_role_and_the_fitted_times(
    name: str, prefill: Line, decode: Line, chunk_tokens: int
) -> None:
    settings = load_fleet(name, {})

    assert step_times(settings) == LinearStepTimes(prefill=prefill, decode=decode)
    assert [(g.count, g.chunk_tokens) for g in settings.fleet.prefill] == [(4, chunk_tokens)]
    assert [g.count for g in settings.fleet.decode] == [4]


def test_a_fleet_is_found_by_path_too_and_the_environment_overrides_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((Path(__file__).parents[2] / "adapters/simulator/fleets/paper.yaml").read_text())
    environ = {"KAIROS_FLEET__PREFILL__0__COUNT": "3"}

    assert load_fleet(path, environ).fleet == load_fleet("paper", environ).fleet
    assert load_fleet(path, environ).fleet.prefill[0].count == 3


def test_the_built_in_names_are_listed() -> None:
    assert fleet_names() == ["b300", "h100", "paper"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'b300'"):
        load_fleet("b30", {})


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_fleet(tmp_path / "mine.yaml", {})
