"""The contract that every policy keeps, for authors to run on theirs: `check_policy(MyPolicy)`.

Each rule is one function whose docstring says it. The cases are fixed: a lone request, many with mixed targets, ties,
lost ones, none with a target, full instances and empty ones. Passing says that a policy can be trusted with a queue,
not that it is a good one: that is what `kairos compare` is for.
"""

import ast
import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import msgspec

from kairos.scheduler_core.decider import decode_view
from kairos.scheduler_core.domain import (
    DecodeInstance,
    Line,
    LinearStepTimes,
    PrefillInstance,
    RequestId,
    Resident,
    Waiting,
)
from kairos.scheduler_core.errors import KairosError
from kairos.scheduler_core.guards import check_decode_plan
from kairos.scheduler_core.plugins import METHODS, PolicyKind
from kairos.scheduler_core.policy import (
    Admission,
    AdmissionView,
    DecodeLoad,
    DecodePlacementView,
    DecodePlan,
    DecodeStep,
    DecodeView,
    Peer,
    PrefillLoad,
    PrefillPlacementView,
    PrefillPlan,
    PrefillStep,
    PrefillView,
)
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.slo import NO_TARGET_S, token_deadline_s, ttft_deadline_s

View = PrefillView | PrefillPlacementView | DecodePlacementView | DecodeView | AdmissionView

IMPURE_MODULES = frozenset(
    {
        *("asyncio", "concurrent", "ctypes", "datetime", "glob", "http", "httpx", "io", "logging", "multiprocessing"),
        *("os", "pathlib", "random", "requests", "secrets", "shutil", "signal", "socket", "sqlite3", "subprocess"),
        *("tempfile", "threading", "time", "urllib", "uuid"),
    }
)
"""Modules through which a rule could reach a clock, chance or the world outside."""

_IMPURE_CALLS = frozenset({"open", "input", "print", "exec", "eval", "__import__"})


class ContractError(KairosError):
    """A policy breaks the contract; the message says which rule, and on which case."""


def check_policy(policy: type[Any], kind: PolicyKind | None = None, **parameters: Any) -> None:
    """Run the contract on a policy class.

    Args:
        policy: the class, as its entry point names it.
        kind: what kind of policy it is; None = told from its method.
        parameters: what to build it with, beyond its defaults.

    Raises:
        ContractError: it breaks a rule; the message names the rule and the case.
    """
    kind = _kind_of(policy) if kind is None else kind
    subject = _Subject(policy, kind, parameters)
    _reaches_nothing_outside(subject)
    _has_the_method_of_its_kind(subject)
    _keeps_its_memory_in_state(subject)
    policy_object = subject.build()
    for case in _CASES[kind]():
        before = _state_of(policy_object)
        answer = _answers_and_changes_nothing(subject, policy_object, case)
        _ANSWER_RULES[kind](subject, case, answer)
        _answers_the_same_again(subject, policy_object, case, before, answer)
        if callable(getattr(policy_object, "observe", None)):
            _observes(subject, policy_object, case)


class _Subject(NamedTuple):
    """The policy under check."""

    policy: type[Any]
    kind: PolicyKind
    parameters: dict[str, Any]

    def build(self) -> Any:
        try:
            return self.policy(**self.parameters)
        except Exception as problem:
            raise self.broken("can be built from its parameters alone", f"{problem!r}") from problem

    def ask(self, policy_object: Any, view: View) -> Any:
        method = next(m for m in METHODS[self.kind] if callable(getattr(policy_object, m, None)))
        return getattr(policy_object, method)(view)

    def broken(self, rule: str, found: str, case: str = "") -> ContractError:
        """The error for a rule: `rule` completes the sentence "a policy ..."."""
        where = f" in the case '{case}'" if case else ""
        return ContractError(
            f"{self.policy.__name__} breaks the contract of a {self.kind} policy{where}: {found}; a policy {rule}"
        )


class _Case(NamedTuple):
    """One thing to ask: `view()` makes it afresh each time."""

    name: str
    view: Callable[[], View]


# -- rules of all kinds ----------------------------------------------------------------------------------------------


def _kind_of(policy: type[Any]) -> PolicyKind:
    found = [kind for kind, methods in METHODS.items() if any(callable(getattr(policy, m, None)) for m in methods)]
    if len(found) != 1:
        known = ", ".join(method for methods in METHODS.values() for method in methods)
        raise ContractError(
            f"{policy.__name__} has the method of {len(found)} kinds; a policy has the method of one: {known}"
        )
    return found[0]


def _has_the_method_of_its_kind(subject: _Subject) -> None:
    """A policy has the method of its kind, and an admission policy says whether it needs a prediction."""
    methods = METHODS[subject.kind]
    if not any(callable(getattr(subject.policy, method, None)) for method in methods):
        raise subject.broken(f"has a method {' or '.join(methods)}(view)", "it has none")
    if subject.kind == "admission" and not isinstance(getattr(subject.build(), "needs_prediction", None), bool):
        raise subject.broken("of this kind says needs_prediction = True or False", "it does not say")


def _reaches_nothing_outside(subject: _Subject) -> None:
    """A policy reaches no clock, no chance and nothing outside: neither it nor what it uses of its module does."""
    module = sys.modules.get(subject.policy.__module__)
    try:
        tree = ast.parse(inspect.getsource(module)) if module is not None else ast.Module([], [])
    except (OSError, TypeError):  # typed into an interpreter: there is no source to read
        return
    rule = "reads no clock, does no I/O and draws no random number"
    imported = _imported(tree)
    for node in _used_by(subject.policy.__name__, tree):
        if isinstance(node, ast.Attribute) and node.attr == "random":
            raise subject.broken(rule, f"it uses {ast.unparse(node)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _IMPURE_CALLS:
            raise subject.broken(rule, f"it calls {node.func.id}()")
        origin = imported.get(node.id, "") if isinstance(node, ast.Name) else ""
        if origin.split(".")[0] in IMPURE_MODULES or origin.startswith("numpy.random"):
            raise subject.broken(rule, f"it uses {origin}")


def _imported(tree: ast.Module) -> dict[str, str]:
    """Where each imported name of a module comes from."""
    origins = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            origins.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return origins


def _used_by(name: str, tree: ast.Module) -> Iterator[ast.AST]:
    """The syntax of a class and of everything in its module that it uses, directly or not."""
    defined: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    todo = [name]
    while todo:
        for node in ast.walk(defined.pop(todo.pop(), ast.Module([], []))):
            yield node
            if isinstance(node, ast.Name):
                todo.append(node.id)


def _keeps_its_memory_in_state(subject: _Subject) -> None:
    """A policy with memory keeps all of it in `state`, one msgspec.Struct of its own that survives JSON."""
    one, other = subject.build(), subject.build()
    state = getattr(one, "state", None)
    if state is None:
        return
    rule = "keeps its memory in `state`, one msgspec.Struct that comes back from JSON as it was"
    if not isinstance(state, msgspec.Struct):
        raise subject.broken(rule, f"its state is a {type(state).__name__}")
    if state is getattr(other, "state", None):
        raise subject.broken(rule, "two of it share one state")


def _state_of(policy_object: Any) -> bytes:
    state = getattr(policy_object, "state", None)
    return b"" if state is None else msgspec.json.encode(state)


def _with_state(policy_object: Any, state: bytes) -> Any:
    if state:
        policy_object.state = msgspec.json.decode(state, type=type(policy_object.state))
    return policy_object


def _answers_and_changes_nothing(subject: _Subject, policy_object: Any, case: _Case) -> Any:
    """A policy answers every view, and changes nothing in it."""
    view = case.view()
    shown = repr(view)
    try:
        answer = subject.ask(policy_object, view)
    except Exception as problem:
        raise subject.broken("answers every view", f"it raises {problem!r}", case.name) from problem
    if repr(view) != shown:
        raise subject.broken("reads its view and changes nothing in it", "the view is another afterwards", case.name)
    return answer


def _answers_the_same_again(subject: _Subject, asked: Any, case: _Case, before: bytes, answer: Any) -> None:
    """A policy answers the same view from the same state in the same way, its memory told apart by `state` alone."""
    rule = "gives the same answer to the same view and the same state, which holds all of its memory"
    try:
        fresh = _with_state(subject.build(), before)
        restored = _state_of(fresh)
    except (msgspec.MsgspecError, TypeError) as problem:
        raise subject.broken("has a state that comes back from JSON", f"{problem!r}", case.name) from problem
    if restored != before:
        raise subject.broken("has a state that comes back from JSON", "it comes back as another", case.name)
    again = subject.ask(fresh, copy.deepcopy(case.view()))
    if _plain(again) != _plain(answer):
        raise subject.broken(rule, f"it answers {_plain(answer)} and then {_plain(again)}", case.name)
    if _state_of(fresh) != _state_of(asked):
        raise subject.broken(rule, "its state afterwards differs", case.name)


def _observes(subject: _Subject, policy_object: Any, case: _Case) -> None:
    """A policy that observes takes every step of its instance."""
    step: PrefillStep | DecodeStep = (
        PrefillStep(0.25, 2_000) if subject.kind == "prefill" else DecodeStep(0.03, 3, 6_000, 4_000, [7, 120])
    )
    try:
        policy_object.observe(step)
    except Exception as problem:
        raise subject.broken("observes every step of its instance", f"it raises {problem!r}", case.name) from problem


def _plain(answer: Any) -> Any:
    """An answer in a form that compares by value."""
    if isinstance(answer, msgspec.Struct):
        return {field: _plain(getattr(answer, field)) for field in answer.__struct_fields__}
    return list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else answer


# -- rules of each kind ----------------------------------------------------------------------------------------------


def _orders_who_waits(subject: _Subject, case: _Case, answer: Any) -> None:
    """A prefill policy names at least as many of the waiting as are wanted, each once, the same first ones always."""
    view = case.view()
    assert isinstance(view, PrefillView)
    if hasattr(subject.policy, "plan"):
        rule = "that packs answers a PrefillPlan with at least one request in the step"
        if not isinstance(answer, PrefillPlan):
            raise subject.broken(rule, f"it answers a {type(answer).__name__}", case.name)
        if not isinstance(answer.together, int) or answer.together < 1:
            raise subject.broken(rule, f"it packs {answer.together!r}", case.name)
        answer = answer.order
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise subject.broken("answers a sequence of ids", f"it answers a {type(answer).__name__}", case.name)
    waiting = {w.request_id for w in (*view.waiting, *view.lost)}
    if strangers := [request_id for request_id in answer if request_id not in waiting]:
        raise subject.broken("names requests that wait", f"it names {strangers[0]!r}", case.name)
    if len(set(answer)) != len(answer):
        raise subject.broken("names each request once", "it names one twice", case.name)
    needed = min(view.wanted, len(view.waiting))
    if len(answer) < needed:
        raise subject.broken("names as many requests as are wanted", f"it names {len(answer)} of {needed}", case.name)
    first = subject.ask(subject.build(), msgspec.structs.replace(view, wanted=1))
    alone = subject.ask(subject.build(), view)
    if _order(first)[:1] != _order(alone)[:1]:
        raise subject.broken("names the same first request however many are wanted", "it names another", case.name)


def _order(answer: Any) -> list[RequestId]:
    return list(answer.order if isinstance(answer, PrefillPlan) else answer)


def _places_on_an_offered_instance(subject: _Subject, case: _Case, answer: Any) -> None:
    """A placement policy answers the id of an instance that is offered; a prefill one may answer None."""
    view = case.view()
    assert isinstance(view, PrefillPlacementView | DecodePlacementView)
    offered = [load.instance.instance_id for load in view.instances]
    if answer not in offered and not (answer is None and subject.kind == "prefill_placement"):
        raise subject.broken("places on an instance that is offered", f"it answers {answer!r} of {offered}", case.name)


def _keeps_to_the_instance(subject: _Subject, case: _Case, answer: Any) -> None:
    """A decode policy names who is there, once, within the KV room and the batch limit, and lets somebody run."""
    view = case.view()
    assert isinstance(view, DecodeView)
    if not isinstance(answer, DecodePlan):
        raise subject.broken("of this kind answers a DecodePlan", f"it answers a {type(answer).__name__}", case.name)
    try:
        check_decode_plan(answer, view)
    except (KairosError, TypeError) as problem:
        raise subject.broken("keeps to who is there and to the room there is", f"it {problem}", case.name) from problem
    if len(answer.swap_out) == len(view.residents) and not answer.admit:
        raise subject.broken("lets somebody run where somebody can", "it leaves the instance empty", case.name)


def _accepts_or_says_when(subject: _Subject, case: _Case, answer: Any) -> None:
    """An admission policy accepts, or refuses with a status, a reason and when to come back, 1 to 60 s later."""
    if not isinstance(answer, Admission):
        raise subject.broken("of this kind answers an Admission", f"it answers a {type(answer).__name__}", case.name)
    if answer.accept:
        return
    rule = "that refuses says why, with a status from 400 to 599, and to come back within 1 to 60 s"
    if not (400 <= answer.status <= 599 and answer.reason and 1 <= answer.retry_after_s <= 60):
        raise subject.broken(rule, f"it answers {answer}", case.name)


_ANSWER_RULES: dict[PolicyKind, Callable[[_Subject, _Case, Any], None]] = {
    "prefill": _orders_who_waits,
    "prefill_placement": _places_on_an_offered_instance,
    "decode_placement": _places_on_an_offered_instance,
    "decode": _keeps_to_the_instance,
    "admission": _accepts_or_says_when,
}


# -- cases -----------------------------------------------------------------------------------------------------------

_TIMES = LinearStepTimes(prefill=Line(0.01, 2e-5, 4e-10), decode=Line(0.01, 2e-4, 2e-8))
_SLOW_TIMES = LinearStepTimes(prefill=Line(0.02, 8e-5, 2e-9), decode=Line(0.03, 1e-3, 2e-7))
_NOW_S = 100.0
_MANY = 60


def _waiting(number: int, waited_s: float, prompt: int, target_s: float, prefilled: int = 0, name: str = "") -> Waiting:
    arrival_s = _NOW_S - waited_s
    return Waiting(
        f"{name}{number}" if name else number,
        arrival_s,
        prompt,
        target_s,
        ttft_deadline_s(arrival_s, target_s),
        _TIMES.remaining_prefill_s(prompt - prefilled, prefilled, 2_048),
        _TIMES.remaining_prefill_s(prompt, 0, 2_048),
        prefilled_tokens=prefilled,
        slo_class=("default", "tight")[number % 2],
        tenant=("", "a", "b")[number % 3],
        weight=(1.0, 2.0, 0.5, 1.0)[number % 4],
    )


def _prefill_cases() -> Iterator[_Case]:
    waits: dict[str, list[Waiting]] = {
        "a lone request": [_waiting(0, 0.5, 3_000, 2.0)],
        "a lone request that is lost": [_waiting(0, 9.0, 3_000, 2.0)],
        "many requests with mixed targets": [
            _waiting(n, (n * 37 % 50) / 10, 50 + n * 7_919 % 20_000, (0.5, 2.0, 8.0)[n % 3], name="r")
            for n in range(_MANY)
        ],
        "unfinished prompts": [_waiting(n, n * 0.1, 9_000, 2.0 + n % 2, prefilled=2_048 * (n % 4)) for n in range(12)],
        "ties": [_waiting(n, 1.0, 1_000, 2.0) for n in range(8)],
        "nobody in time": [_waiting(n, 10.0 + n, 500 * (n + 1), 2.0) for n in range(8)],
        "nobody with a target": [_waiting(n, n * 0.5, 4_000 - 400 * n, NO_TARGET_S) for n in range(8)],
    }
    elsewhere = [_waiting(1_000, 1.0, 5_000, 4.0, prefilled=2_048)]
    peers = [
        Peer("near", _NOW_S + 0.2, elsewhere),
        Peer("other hardware", _NOW_S - 1.0, (), prefill_s=_twice_the_seconds),
    ]
    for (name, waiting), chunk_tokens, most, others, wanted in product(
        waits.items(), (None, 2_048), (1, 4), ((), peers), (1, 3, 1_000)
    ):
        instance = PrefillInstance("asking", _TIMES, chunk_tokens, most)

        def view(
            waiting: Sequence[Waiting] = waiting,
            instance: PrefillInstance = instance,
            others: Sequence[Peer] = others,
            wanted: int = wanted,
        ) -> PrefillView:
            queue = WaitingQueue(waiting, _NOW_S)
            return PrefillView(_NOW_S, instance, queue.by_arrival, queue.by_deadline, queue.lost, wanted, list(others))

        yield _Case(name, view)


def _twice_the_seconds(w: Waiting) -> float:
    return 2 * w.prefill_s


def _prefill_placement_cases() -> Iterator[_Case]:
    arriving = _waiting(7, 0.0, 6_000, 2.0)
    loads = {
        "a lone instance": [(0, 0, 0.0, 0)],
        "ties": [(2, 4_000, 0.3, 0)] * 4,
        "mixed loads": [(3, 9_000, 0.9, 0), (1, 40_000, 2.5, 4_096), (0, 0, 0.0, 512), (9, 2_000, 0.4, 4_096)],
        "everyone overloaded": [(50 + n, 400_000 - n, 30.0 + n, 0) for n in range(5)],
    }
    for name, states in loads.items():
        for target_s in (2.0, NO_TARGET_S):

            def view(states: Sequence[tuple[int, int, float, int]] = states, target_s: float = target_s) -> View:
                request = msgspec.structs.replace(arriving, ttft_target_s=target_s, deadline_s=_NOW_S + target_s)
                instances = [
                    PrefillLoad(
                        PrefillInstance(f"prefill-{n}", (_TIMES, _SLOW_TIMES)[n % 2], 2_048, 4),
                        requests,
                        tokens,
                        outstanding_s,
                        request.prefill_s * (1 + n % 2),
                        cached,
                    )
                    for n, (requests, tokens, outstanding_s, cached) in enumerate(states)
                ]
                return PrefillPlacementView(_NOW_S, request, instances)

            yield _Case(name, view)


def _resident(number: int, context: int, emitted: int, late_targets: float, target_s: float) -> Resident:
    """A request whose next token is `late_targets` targets late; without a target it just waits."""
    gap_s = target_s if math.isfinite(target_s) else 0.05
    first_s = _NOW_S - (emitted + late_targets) * gap_s
    due_s = token_deadline_s(first_s, target_s, emitted)
    return Resident(number, context, emitted, first_s, due_s, target_s, first_s, _NOW_S - gap_s)


def _decode_cases() -> Iterator[_Case]:
    mixed = (0.025, 0.05, 0.1)
    people: dict[str, tuple[list[Resident], list[Resident]]] = {
        "a lone request, not admitted yet": ([], [_resident(0, 3_000, 1, 0.0, 0.05)]),
        "a lone resident": ([_resident(0, 3_000, 9, 0.0, 0.05)], []),
        "a lone resident that is hopelessly late": ([_resident(0, 3_000, 9, 50.0, 0.05)], []),
        "many with mixed targets": (
            [_resident(n, 500 + n * 7_919 % 9_000, 2 + n, (n % 7) - 3.0, mixed[n % 3]) for n in range(_MANY)],
            [_resident(100 + n, 900 * (n + 1), 1, 0.0, mixed[n % 3]) for n in range(12)],
        ),
        "ties": (
            [_resident(n, 2_000, 5, 0.0, 0.05) for n in range(6)],
            [_resident(10 + n, 2_000, 1, 0.0, 0.05) for n in range(6)],
        ),
        "nobody with a target": (
            [_resident(n, 1_000 * (n + 1), 5, 0.0, NO_TARGET_S) for n in range(4)],
            [_resident(10 + n, 2_000, 1, 0.0, NO_TARGET_S) for n in range(4)],
        ),
        "a target that no batch can meet": (
            [_resident(0, 1_000, 5, 0.0, 0.005), _resident(1, 1_000, 5, 0.0, 0.05)],
            [_resident(2, 2_000, 1, 0.0, 0.005), _resident(3, 2_000, 1, 0.0, NO_TARGET_S)],
        ),
        "everyone overdue": (
            [_resident(n, 4_000 + n, 5, 20.0 + n, 0.05) for n in range(6)],
            [_resident(10 + n, 2_000, 1, 20.0, 0.05) for n in range(3)],
        ),
    }
    for (name, (residents, ready)), times, room, limit in product(
        people.items(), (_TIMES, _SLOW_TIMES), (2**40, 3_000), (2**40, 2)
    ):
        held = sum(r.context_tokens for r in residents) + len(residents)
        instance = DecodeInstance("decode-0", times, 64, held + room, max(limit, len(residents)))

        def view(
            instance: DecodeInstance = instance,
            residents: Sequence[Resident] = residents,
            ready: Sequence[Resident] = ready,
        ) -> DecodeView:
            return decode_view(_NOW_S, instance, copy.deepcopy(residents), copy.deepcopy(ready))

        yield _Case(name, view)


def _decode_placement_cases() -> Iterator[_Case]:
    loads = {
        "a lone instance": [(0, 0, 0, 0, NO_TARGET_S)],
        "ties": [(3, 9_000, 0, 0, 0.05)] * 4,
        "mixed loads": [(8, 20_000, 2, 5_000, 0.05), (1, 90_000, 0, 0, 0.025), (0, 0, 0, 0, NO_TARGET_S)],
        "everyone overloaded": [(200 + n, 900_000, 40, 90_000, 0.05) for n in range(5)],
    }
    for (name, states), target_s in product(loads.items(), (0.005, 0.05, NO_TARGET_S)):

        def view(
            states: Sequence[tuple[int, int, int, int, float]] = states, target_s: float = target_s
        ) -> DecodePlacementView:
            instances = [
                DecodeLoad(DecodeInstance(f"decode-{n}", (_TIMES, _SLOW_TIMES)[n % 2], 64, 100_000), *state)
                for n, state in enumerate(states)
            ]
            return DecodePlacementView(_NOW_S, _resident(7, 4_000, 1, 0.0, target_s), instances)

        yield _Case(name, view)


def _admission_cases() -> Iterator[_Case]:
    predictions_s = (0.1, 2.0, 500.0)
    for number, (ttft_s, others, target_s) in enumerate(product(predictions_s, (0, 50), (2.0, NO_TARGET_S))):

        def view(
            number: int = number, ttft_s: float = ttft_s, others: int = others, target_s: float = target_s
        ) -> AdmissionView:
            request = _waiting(number, 0.0, 90_000, target_s)
            return AdmissionView(_NOW_S + 0.1 * number, request, ttft_s, others)

        yield _Case(f"{ttft_s} s predicted, {others} others wait", view)


_CASES: dict[PolicyKind, Callable[[], Iterator[_Case]]] = {
    "prefill": _prefill_cases,
    "prefill_placement": _prefill_placement_cases,
    "decode_placement": _decode_placement_cases,
    "decode": _decode_cases,
    "admission": _admission_cases,
}
