"""The shipped contract: every policy keeps it, and each way to break it is named."""

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

import kairos.policies
from kairos.policies.checks import ContractError, check_policy
from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.plugins import POLICY_KINDS, PolicyKind, installed, policy_class
from kairos.scheduler_core.policy import (
    Admission,
    AdmissionView,
    DecodePlacementView,
    DecodePlan,
    DecodeStep,
    DecodeView,
    PrefillPlacementView,
    PrefillPlan,
    PrefillView,
)

INSTALLED = [(kind, name) for kind in POLICY_KINDS for name in sorted(installed(kind))]


@pytest.mark.parametrize(("kind", "name"), INSTALLED)
def test_every_installed_policy_keeps_the_contract(kind: PolicyKind, name: str) -> None:
    check_policy(policy_class(kind, name), kind)


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_every_file_of_a_kind_is_an_entry_point_and_every_entry_point_of_ours_a_file(kind: PolicyKind) -> None:
    folder = Path(*kairos.policies.__path__, kind)
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem != "__init__"}

    registered = {name for name, point in installed(kind).items() if point.module.startswith("kairos.policies.")}

    assert registered == files


# -- policies that break it, and what is said --------------------------------------------------------------------------


class Fair:
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [w.request_id for w in view.waiting]


class SortsTheCallersList(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        view.waiting.sort(key=lambda w: w.prompt_tokens)  # type: ignore[attr-defined]  # that it is a list is the point
        return [w.request_id for w in view.waiting]


class KeepsAHiddenCount(Fair):
    def __init__(self) -> None:
        self.asked = 0

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        self.asked += 1
        ids = [w.request_id for w in view.waiting]
        return ids if self.asked % 2 else ids[::-1]


class OrdersByIdentity(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [w.request_id for w in sorted(view.waiting, key=lambda w: hash(str(id(w))))]


class NamesAStranger(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [*(w.request_id for w in view.waiting), "nobody"]


class NamesOneTwice(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [view.waiting[0].request_id, *(w.request_id for w in view.waiting)]


class DropsTheLost(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [w.request_id for w in view.by_deadline]


class AnswersAGenerator(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return (w.request_id for w in view.waiting)  # type: ignore[return-value]  # the mistake under test


class DividesByTheSpread(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        spread_s = view.waiting[-1].arrival_s - view.waiting[0].arrival_s
        return [w.request_id for w in sorted(view.waiting, key=lambda w: w.prefill_s / spread_s)]


class AnswersByHowManyAreWanted(Fair):
    def order(self, view: PrefillView) -> Sequence[RequestId]:
        return [w.request_id for w in view.waiting[-view.wanted :]]


class PacksNobody:
    def plan(self, view: PrefillView) -> PrefillPlan:
        return PrefillPlan([w.request_id for w in view.waiting], together=0)


class KeepsAPlainDict(Fair):
    def __init__(self) -> None:
        self.state: dict[str, int] = {}


class Turns(msgspec.Struct):
    taken: float = 0.0


class SharesItsState(Fair):
    state: ClassVar[Turns] = Turns()


class Infinite(Fair):
    def __init__(self) -> None:
        self.state = Turns(float("inf"))


class NeedsAnArgument(Fair):
    def __init__(self, weight: float) -> None:
        self.weight = weight


class PlacesOutside:
    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        return "prefill-99"


class LeavesDecodeToOthers:
    def place_decode(self, view: DecodePlacementView) -> str | None:
        return None


class AdmitsEveryone:
    def step(self, view: DecodeView) -> DecodePlan:
        return DecodePlan([r.request_id for r in view.ready])


class AdmitsNobody:
    def step(self, view: DecodeView) -> DecodePlan:
        return DecodePlan()


class LetsStrangersRun:
    def step(self, view: DecodeView) -> DecodePlan:
        return DecodePlan([r.request_id for r in view.ready[:1]], step=["nobody"])


class FailsToObserve(AdmitsNobody):
    def step(self, view: DecodeView) -> DecodePlan:
        return DecodePlan([] if view.residents else [view.ready[0].request_id])

    def observe(self, step: DecodeStep) -> None:
        raise KeyError(step.batch_size)


class RefusesForEver:
    needs_prediction = False

    def admit(self, view: AdmissionView) -> Admission:
        return Admission(accept=False, status=503, reason="never")


class DoesNotSayWhatItNeeds:
    def admit(self, view: AdmissionView) -> Admission:
        return Admission(accept=True)


BROKEN = {
    SortsTheCallersList: "reads its view and changes nothing in it",
    KeepsAHiddenCount: "gives the same answer to the same view and the same state",
    OrdersByIdentity: "gives the same answer to the same view and the same state",
    NamesAStranger: "names requests that wait",
    NamesOneTwice: "names each request once",
    DropsTheLost: "names as many requests as are wanted",
    AnswersAGenerator: "answers a sequence of ids",
    DividesByTheSpread: "answers every view",
    AnswersByHowManyAreWanted: "names the same first request however many are wanted",
    PacksNobody: "at least one request in the step",
    KeepsAPlainDict: "keeps its memory in `state`",
    SharesItsState: "two of it share one state",
    Infinite: "has a state that comes back from JSON",
    NeedsAnArgument: "can be built from its parameters alone",
    PlacesOutside: "places on an instance that is offered",
    LeavesDecodeToOthers: "places on an instance that is offered",
    AdmitsEveryone: "keeps to who is there and to the room there is",
    AdmitsNobody: "lets somebody run where somebody can",
    LetsStrangersRun: "keeps to who is there and to the room there is",
    FailsToObserve: "observes every step of its instance",
    RefusesForEver: "to come back within 1 to 60 s",
    DoesNotSayWhatItNeeds: "says needs_prediction",
}


def test_the_fair_policy_that_the_broken_ones_come_from_keeps_the_contract() -> None:
    check_policy(Fair)


@pytest.mark.parametrize("policy", BROKEN, ids=lambda policy: policy.__name__)
def test_a_broken_policy_is_refused_with_the_rule_it_breaks(policy: type[Any]) -> None:
    with pytest.raises(ContractError, match="breaks the contract") as refusal:
        check_policy(policy)

    assert BROKEN[policy] in str(refusal.value)
    assert policy.__name__ in str(refusal.value)


IMPURE = {
    "import time": "time.monotonic()",
    "from random import random": "random()",
    "import numpy as np": "np.random.rand()",
    "from pathlib import Path": "len(Path('weights').read_text())",
    "import os.path": "os.path.getsize('weights')",
    "": "len(open('weights').read())",
    "from time import time\n\ndef age(w):\n    return time() - w.arrival_s": "age(w)",
}


@pytest.mark.parametrize("line", IMPURE, ids=lambda line: line.partition("\n")[0] or "open()")
def test_a_policy_that_reaches_a_clock_chance_or_a_file_is_refused(line: str, tmp_path: Path) -> None:
    policy = module_of(
        f"""
{line}


class Impure:
    def order(self, view):
        return [w.request_id for w in sorted(view.waiting, key=lambda w: {IMPURE[line]})]
""",
        tmp_path,
    ).Impure

    with pytest.raises(ContractError, match="reads no clock, does no I/O and draws no random number"):
        check_policy(policy, "prefill")


def test_a_policy_that_asks_for_parameters_is_checked_with_them() -> None:
    check_policy(NeedsAnArgument, weight=2.0)


def test_a_class_that_is_no_policy_is_told_which_methods_there_are() -> None:
    with pytest.raises(ContractError, match=r"has the method of 0 kinds.*order, plan, place_prefill"):
        check_policy(Turns)


def test_a_policy_of_another_kind_is_told_the_method_it_lacks() -> None:
    with pytest.raises(ContractError, match=r"has a method step\(view\)"):
        check_policy(Fair, "decode")


_numbers = itertools.count()


def module_of(source: str, folder: Path) -> Any:
    """A module with this source, as an author would have it in a file."""
    path = folder / f"written_policy_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
