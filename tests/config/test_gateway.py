"""The settings of a live fleet and its gateway."""

from pathlib import Path
from typing import Any

import pytest

from kairos.adapters.simulator.fleet import build_fleet
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import ConfigError

PROFILE = {"gpu": "H100", "model": "m", "step_times": {"linear": {"prefill": {"b_s": 1e-4}, "decode": {"a_s": 0.01}}}}
MIXED = {"mixed": [{"profile": "p", "url": "http://a:1"}]}


def settings(fleet: dict[str, Any], gateway: dict[str, Any] | None = None) -> Settings:
    return Settings.model_validate({"profiles": {"p": PROFILE}, "fleet": fleet, "gateway": gateway or {}})


def test_a_fleet_of_mixed_instances_needs_no_other_and_is_not_simulated() -> None:
    with pytest.raises(ConfigError, match="mixed instances are not simulated"):
        build_fleet(settings(MIXED), step_times_of)


@pytest.mark.parametrize(
    ("fleet", "gateway", "said"),
    [
        ({"mixed": [{"profile": "p", "url": "http://a:1", "count": 2}]}, {}, "an address is one instance"),
        ({"mixed": [{"profile": "p", "key": "k", "key_file": "f"}]}, {}, "either key or key_file"),
        ({"mixed": [{"profile": "p", "prefix_cache": True}]}, {}, "prefix_cache needs kv_tokens"),
        ({"prefill": [{"profile": "p"}]}, {}, "at least one decode"),
        (MIXED, {"host": "0.0.0.0"}, "give keys"),
        (MIXED, {"keys": [{"key": "k", "tenant": "a"}, {"key": "k", "tenant": "b"}]}, "two keys are the same"),
        (MIXED, {"keys": [{"key": "k", "tenant": "a", "classes": ["gold"]}]}, "unknown SLO class 'gold'"),
        (MIXED, {"control_plane": {"url": "localhost"}}, "pattern"),
    ],
)
def test_a_mistake_is_refused(fleet: dict[str, Any], gateway: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(fleet, gateway)


def test_keys_are_never_shown() -> None:
    shown = settings({"mixed": [{"profile": "p", "key": "s3cret"}]}, {"keys": [{"key": "s3cret", "tenant": "a"}]})

    assert "s3cret" not in shown.model_dump_json() + repr(shown)


def test_the_example_is_a_live_fleet() -> None:
    loaded = load_settings(Path(__file__).parents[2] / "examples" / "gateway.yaml")

    assert [group.url for _, _, group in loaded.fleet.groups()] == ["http://127.0.0.1:8110", "http://127.0.0.1:8120"]
