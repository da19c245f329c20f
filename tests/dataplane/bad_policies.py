"""Policies that an absolute guard must stop."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillPlacementView, PrefillView


class Raises:
    """A rule with a bug."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """No order at all."""
        raise ZeroDivisionError


class Starves:
    """A placement that leaves all instances but the first one idle."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The first, however long its queue."""
        return view.instances[0].instance.instance_id
