"""A strategy: a named bundle of one policy of each kind, deployed and compared as one."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec
import yaml

from kairos.scheduler_core.domain import Control
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.plugins import PolicyKind, build_policy, policy_class

ORDERING_OPTIONS = ("lost_last", "preempt")
"""Options of the prefill slot that are applied around every ordering rule (docs/policies.md)."""

Scalar = bool | int | float | str


class PolicyChoice(msgspec.Struct, frozen=True):
    """One policy by name, with its parameters.

    >>> str(PolicyChoice("edf", {"lost_last": True}))
    'edf(lost_last=true)'
    """

    name: str
    parameters: dict[str, Any] = {}

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        inside = ",".join(f"{key}={_text(value)}" for key, value in self.parameters.items())
        return f"{self.name}({inside})"


class Strategy(msgspec.Struct, frozen=True):
    """One policy of each kind under one name."""

    name: str
    prefill: PolicyChoice
    prefill_placement: PolicyChoice
    decode_placement: PolicyChoice
    decode: PolicyChoice
    admission: PolicyChoice = PolicyChoice("accept-all")

    @property
    def text(self) -> str:
        """The strategy as `PREFILL+PREFILL_PLACEMENT+DECODE_PLACEMENT+DECODE[+ADMISSION]`."""
        slots = [self.prefill, self.prefill_placement, self.decode_placement, self.decode]
        if self.admission.name != "accept-all":
            slots.append(self.admission)
        return "+".join(map(str, slots))

    def check(self) -> "Strategy":
        """Itself, once every policy was found and took its parameters.

        Raises:
            UnknownPolicyError, ConfigError: as `build_policy`.
        """
        build_prefill(self.prefill)
        for kind, choice in self.choices():
            if kind != "prefill":
                build_policy(kind, choice.name, choice.parameters)
        return self

    def choices(self) -> tuple[tuple[PolicyKind, PolicyChoice], ...]:
        """The policy of each kind."""
        return (
            ("prefill", self.prefill),
            ("prefill_placement", self.prefill_placement),
            ("decode_placement", self.decode_placement),
            ("decode", self.decode),
            ("admission", self.admission),
        )

    def sources(self) -> list[str]:
        """The files that its policies are written in."""
        return [inspect.getfile(policy_class(kind, choice.name)) for kind, choice in self.choices()]


class PrefillRule(msgspec.Struct, frozen=True):
    """A prefill policy with the options that go around it."""

    policy: Any
    packs: bool
    lost_last: bool
    preempt: bool


def build_prefill(choice: PolicyChoice) -> PrefillRule:
    """The prefill policy of a strategy; a packing one decides for itself and ignores both options."""
    parameters = dict(choice.parameters)
    options = {}
    for option in ORDERING_OPTIONS:
        value = parameters.pop(option, False)
        if not isinstance(value, bool):
            raise ConfigError(f"option {option} of prefill policy '{choice.name}' is {value!r}; use true or false")
        options[option] = value
    packs = callable(getattr(policy_class("prefill", choice.name), "plan", None))
    policy = build_policy("prefill", choice.name, parameters)
    return PrefillRule(policy, packs, options["lost_last"] and not packs, options["preempt"] or packs)


def not_applied(strategy: Strategy, prefill: Iterable[Control], decode: Iterable[Control]) -> list[str]:
    """What a strategy asks for that `control` of the instances does not let it do, one sentence each."""
    rule = build_prefill(strategy.prefill)
    notes = []
    prefill_lacks = {control for control in prefill if not control.capabilities.preempt}
    if rule.preempt and prefill_lacks:
        notes.append(f"{strategy.name}: preemption at chunk ends is not applied ({_controls(prefill_lacks)})")
    if rule.packs and (lacks := {control for control in prefill_lacks if not control.capabilities.pack}):
        notes.append(f"{strategy.name}: the choice of prompts that share a step is not applied ({_controls(lacks)})")
    decode_lacks = {control for control in decode if not control.capabilities.participation}
    if strategy.decode.name != "continuous" and decode_lacks:
        notes.append(
            f"{strategy.name}: decode policy {strategy.decode.name} is not applied ({_controls(decode_lacks)}); "
            "the engine's continuous batching runs instead"
        )
    return notes


def _controls(controls: Iterable[Control]) -> str:
    return "control: " + ", ".join(sorted(controls))


def parse_strategy(text: str) -> Strategy:
    """A strategy from `PREFILL+PREFILL_PLACEMENT+DECODE_PLACEMENT+DECODE[+ADMISSION]`, parameters in brackets.

    >>> parse_strategy("edf(lost_last=true)+late+headroom+slack(h=0.9)").decode
    PolicyChoice(name='slack', parameters={'h': 0.9})
    """
    slots = re.split(r"\+(?![^(]*\))", text)
    if not 4 <= len(slots) <= 5:
        raise ConfigError(
            f"strategy '{text}' has {len(slots)} parts; write PREFILL+PREFILL_PLACEMENT+DECODE_PLACEMENT+DECODE, "
            "with +ADMISSION if wanted, or a name from the configuration"
        )
    return Strategy(text, *map(_parse_choice, slots))


def split_strategies(text: str) -> list[str]:
    """A comma-separated list of strategies; commas inside brackets separate parameters.

    >>> split_strategies("kairos,edf(lost_last=true,preempt=true)+late+headroom+capped")
    ['kairos', 'edf(lost_last=true,preempt=true)+late+headroom+capped']
    """
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _parse_choice(text: str) -> PolicyChoice:
    match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise ConfigError(f"cannot read policy '{text}'; write NAME or NAME(parameter=value,...)")
    name, inside = match.groups()
    parameters: dict[str, Any] = {}
    for assignment in filter(None, (inside or "").split(",")):
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read parameter '{assignment}' of policy '{name}'; write parameter=value")
        parameters[key.strip()] = _scalar(value.strip())
    return PolicyChoice(name, parameters)


def _scalar(text: str) -> Scalar:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a bracket left open; a date that cannot be
        value = text
    if isinstance(value, bool | int | float):
        return value
    try:
        return float(text)  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return text


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
