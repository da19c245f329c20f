"""Policies by name."""

import sys
from pathlib import Path

import pytest

from kairos.scheduler_core.errors import ConfigError, UnknownPolicyError
from kairos.scheduler_core.plugins import POLICY_KINDS, PolicyKind, build_policy, installed, policy_class
from kairos.scheduler_core.policy import PrefillView


class Newest:
    """A third party's rule, for the way by `module:Class`."""

    def __init__(self, most: int = 10) -> None:
        if most < 1:
            raise ValueError(f"most is {most}; use 1 or more")
        self.most = most

    def order(self, view: PrefillView) -> list[int | str]:
        return [w.request_id for w in reversed(view.waiting)]


HERE = f"{__name__}:Newest"


def test_a_policy_is_found_under_its_registered_name() -> None:
    assert policy_class("prefill", "on-time").__module__ == "kairos.policies.prefill.on_time"
    assert policy_class("decode", "kairos-paper") is not policy_class("prefill", "kairos-paper")


def test_a_policy_is_found_as_module_and_class() -> None:
    assert policy_class("prefill", HERE) is Newest


def test_an_unknown_name_offers_the_nearest_and_lists_what_there_is() -> None:
    with pytest.raises(UnknownPolicyError) as refusal:
        policy_class("prefill", "on-tim")

    assert str(refusal.value) == (
        "unknown prefill policy 'on-tim'. Did you mean 'on-time'? Installed: " + ", ".join(sorted(installed("prefill")))
    )


def test_a_name_of_another_kind_is_unknown() -> None:
    with pytest.raises(UnknownPolicyError, match="unknown decode policy 'sjf'"):
        policy_class("decode", "sjf")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:Rule", "cannot load prefill policy 'no_such_module:Rule' from no_such_module:Rule"),
        (f"{__name__}:NoSuchClass", "has no attribute 'NoSuchClass'"),
        (f"{__name__}:HERE", r"is no prefill policy: it needs a class with order\(view\) or plan\(view\)"),
        ("pathlib:Path", r"pathlib:Path is no prefill policy: it needs a class with order\(view\) or plan\(view\)"),
    ],
)
def test_what_cannot_be_loaded_or_is_no_policy_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        policy_class("prefill", name)


def test_a_module_that_does_not_parse_is_refused_with_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written_policy.py").write_text("class Rule:\n    def order(self, view)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    with pytest.raises(ConfigError, match="cannot load prefill policy 'half_written_policy:Rule'"):
        policy_class("prefill", "half_written_policy:Rule")


def test_a_policy_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is no decode policy: it needs a class with step\(view\)"):
        policy_class("decode", HERE)


def test_parameters_reach_the_policy_and_the_rest_keeps_its_defaults() -> None:
    policy = build_policy("prefill", "short-first", {"short_tokens": 100})

    assert (policy.short_tokens, policy.long_max_wait_s) == (100, 10.0)


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("short-first", {"short": 1}, "has no parameter 'short'; it takes: short_tokens, long_max_wait_s"),
        ("fcfs", {"h": 1}, "has no parameter 'h'; it takes: none"),
        ("short-first", {"short_tokens": -1}, "prefill policy 'short-first': short_tokens is -1; use 0 or more"),
        ("short-first", {"short_tokens": "many"}, "prefill policy 'short-first': '<' not supported"),
        (HERE, {"most": 0}, "most is 0; use 1 or more"),
    ],
)
def test_parameters_that_a_policy_does_not_take_are_refused(
    name: str, parameters: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        build_policy("prefill", name, parameters)


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_every_built_policy_is_a_new_object(kind: PolicyKind) -> None:
    name = min(installed(kind))

    assert build_policy(kind, name, {}) is not build_policy(kind, name, {})
