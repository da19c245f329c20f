"""One after the other."""

import msgspec

from kairos.scheduler_core.policy import PrefillPlacementView


class Turn(msgspec.Struct):
    """Whose turn it is."""

    next_place: int = 0


class RoundRobin:
    """Deal arrivals out to the instances in turn, the first to the first."""

    def __init__(self) -> None:
        self.state = Turn()

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The instance whose turn it is."""
        place = self.state.next_place % len(view.instances)
        self.state.next_place = place + 1
        return view.instances[place].instance.instance_id
