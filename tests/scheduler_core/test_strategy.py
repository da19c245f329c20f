"""Strategies as text and as objects."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos.scheduler_core.errors import ConfigError, UnknownPolicyError
from kairos.scheduler_core.strategy import (
    PolicyChoice,
    Strategy,
    build_prefill,
    parse_strategy,
    split_strategies,
)

names = st.sampled_from(["fcfs", "kairos-paper", "prefix2", "my_package.rules:Weighted"])
words = st.sampled_from(["some-word", "a/path", "two words"])  # none that YAML reads as a number or a boolean
values = st.booleans() | st.integers() | st.floats(allow_nan=False) | words
parameters = st.dictionaries(st.sampled_from(["h", "patience", "long_max_wait_s"]), values)
choices = st.builds(PolicyChoice, names, parameters)


@settings(deadline=None, max_examples=40)
@given(st.builds(Strategy, st.just("any"), choices, choices, choices, choices, choices))
def test_a_strategy_read_from_its_own_text_is_the_same(strategy: Strategy) -> None:
    again = parse_strategy(strategy.text)

    assert again == Strategy(
        strategy.text,
        strategy.prefill,
        strategy.prefill_placement,
        strategy.decode_placement,
        strategy.decode,
        strategy.admission,
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.builds(Strategy, st.just("any"), choices, choices, choices, choices), min_size=1, max_size=4))
def test_a_list_of_strategies_is_split_between_them_and_not_inside(strategies: list[Strategy]) -> None:
    texts = [strategy.text for strategy in strategies]

    assert split_strategies(", ".join(texts)) == texts


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", True), ("3", 3), ("0.9", 0.9), ("1e-3", 0.001), ("2.5e9", 2.5e9), ("some-word", "some-word")],
)
def test_a_parameter_is_read_as_what_it_looks_like(written: str, read: object) -> None:
    value = parse_strategy(f"fcfs+late+headroom+slack(h={written})").decode.parameters["h"]

    assert (value, type(value)) == (read, type(read))


def test_without_an_admission_policy_everyone_is_accepted_and_the_text_stays_short() -> None:
    strategy = parse_strategy("fcfs+late+headroom+continuous")

    assert strategy.admission == PolicyChoice("accept-all")
    assert strategy.text == "fcfs+late+headroom+continuous"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fcfs+late+headroom", "has 3 parts; write PREFILL"),
        ("a+b+c+d+e+f", "has 6 parts"),
        ("fcfs+late+headroom+slack(0.9)", "cannot read parameter '0.9' of policy 'slack'"),
        ("fcfs+late+headroom+slack(=0.9)", "cannot read parameter '=0.9'"),
        ("fcfs+late+headroom+slack(h=1", r"cannot read policy 'slack\(h=1'"),
        ("+late+headroom+continuous", "cannot read policy ''"),
    ],
)
def test_a_strategy_that_cannot_be_read_is_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_strategy(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("urgancy+late+headroom+continuous", "unknown prefill policy 'urgancy'. Did you mean 'urgency'?"),
        ("fcfs+latte+headroom+continuous", "unknown prefill placement policy 'latte'. Did you mean 'late'?"),
        ("fcfs+late+headrom+continuous", "unknown decode placement policy 'headrom'. Did you mean 'headroom'?"),
        ("fcfs+late+headroom+continous", "unknown decode policy 'continous'. Did you mean 'continuous'?"),
        ("fcfs+late+headroom+capped+accept", "unknown admission policy 'accept'. Did you mean 'accept-all'?"),
    ],
)
def test_checking_a_strategy_finds_an_unknown_policy_in_every_slot(text: str, says: str) -> None:
    with pytest.raises(UnknownPolicyError) as refusal:
        parse_strategy(text).check()

    assert str(refusal.value).startswith(says)


def test_an_option_that_is_no_boolean_is_refused() -> None:
    with pytest.raises(ConfigError, match="option lost_last of prefill policy 'edf' is 'perhaps'; use true or false"):
        build_prefill(PolicyChoice("edf", {"lost_last": "perhaps"}))


def test_options_are_kept_from_the_policy_and_parameters_reach_it() -> None:
    rule = build_prefill(PolicyChoice("short-first", {"lost_last": True, "short_tokens": 100}))

    assert (rule.lost_last, rule.preempt, rule.packs) == (True, False, False)
    assert rule.policy.short_tokens == 100
