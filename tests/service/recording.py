"""Third-party policies that note what they saw and answered, for the comparison of simulator and service."""

from collections.abc import Sequence
from copy import copy
from typing import ClassVar

from kairos.scheduler_core.domain import RequestId, Resident
from kairos.scheduler_core.plugins import build_policy
from kairos.scheduler_core.policy import DecodePlan, DecodeView, PrefillPlacementView, PrefillView


class LongestFirst:
    """A prefill rule that Kairos does not ship."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by prompt length, the longest first."""
        return [w.request_id for w in sorted(view.waiting, key=lambda w: (-w.prompt_tokens, w.request_id))]


class Recorded:
    """Decides as a shipped decode policy and keeps every view with its plan."""

    seen: ClassVar[list[tuple[DecodeView, list[Resident], list[Resident], DecodePlan]]] = []

    def __init__(self, policy: str) -> None:
        self._policy = build_policy("decode", policy, {})

    def step(self, view: DecodeView) -> DecodePlan:
        """What the shipped policy says."""
        plan: DecodePlan = self._policy.step(view)
        self.seen.append((view, [copy(r) for r in view.residents], [copy(r) for r in view.ready], plan))
        return plan


class Hoarder(LongestFirst):
    """Breaks the contract: its memory cannot be written down."""

    def __init__(self) -> None:
        self.state = object()


class Undecided:
    """A placement that binds nothing, under a name of its own."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """None: whichever instance is free first."""
        return None


class Failing:
    """Breaks the contract: it fails with what it saw."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Never comes back with an answer."""
        raise RuntimeError(f"failed on {view.waiting}")
