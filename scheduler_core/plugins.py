"""Policies by name: built-in ones and third parties' alike are found through entry points, or as `module:Class`."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from kairos.scheduler_core.errors import ConfigError, UnknownPolicyError

PolicyKind = Literal["prefill", "prefill_placement", "decode_placement", "decode", "admission"]
POLICY_KINDS: tuple[PolicyKind, ...] = get_args(PolicyKind)

METHODS: dict[PolicyKind, tuple[str, ...]] = {
    "prefill": ("order", "plan"),
    "prefill_placement": ("place_prefill",),
    "decode_placement": ("place_decode",),
    "decode": ("step",),
    "admission": ("admit",),
}


@cache
def installed(kind: PolicyKind) -> dict[str, EntryPoint]:
    """Entry points of one kind by name, as they were when the process first asked."""
    return {point.name: point for point in entry_points(group=f"kairos.policies.{kind}")}


@cache
def policy_class(kind: PolicyKind, name: str) -> type[Any]:
    """The class behind a registered name or a `module:Class`.

    Raises:
        UnknownPolicyError: nothing is registered under this name.
        ConfigError: the class cannot be imported, or is no policy of this kind.
    """
    points = installed(kind)
    if name in points:
        point = points[name]
    elif ":" in name:
        point = EntryPoint(name=name, value=name, group=f"kairos.policies.{kind}")
    else:
        raise UnknownPolicyError(f"{kind.replace('_', ' ')} policy", name, points)
    try:
        module = importlib.import_module(point.module)
        found = getattr(module, point.attr)
    except (ImportError, AttributeError, SyntaxError) as problem:
        raise ConfigError(f"cannot load {kind} policy '{name}' from {point.value}: {problem}") from problem
    if not inspect.isclass(found) or not any(callable(getattr(found, method, None)) for method in METHODS[kind]):
        wanted = " or ".join(f"{method}(view)" for method in METHODS[kind])
        raise ConfigError(f"{point.value} is no {kind} policy: it needs a class with {wanted}")
    return found


def build_policy(kind: PolicyKind, name: str, parameters: dict[str, Any]) -> Any:
    """A new policy object.

    Raises:
        ConfigError: a parameter it does not take, or a value it refuses.
    """
    found = policy_class(kind, name)
    accepted = _parameters(found)  # type: ignore[arg-type]  # a class is hashable, type[Any] is not told so
    unknown = sorted(set(parameters) - set(accepted))
    if unknown:
        known = ", ".join(accepted) or "none"
        raise ConfigError(f"{kind} policy '{name}' has no parameter '{unknown[0]}'; it takes: {known}")
    try:
        return found(**parameters)
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{kind} policy '{name}': {problem}") from problem


@cache
def _parameters(policy: Callable[..., object]) -> tuple[str, ...]:
    """Names of the arguments that a policy takes."""
    return tuple(p.name for p in inspect.signature(policy).parameters.values() if p.kind is not p.VAR_KEYWORD)
