"""Fewest requests."""

from kairos.scheduler_core.policy import DecodePlacementView


class LeastRequests:
    """The instance with the fewest residents and waiting requests (ties: the first)."""

    def place_decode(self, view: DecodePlacementView) -> str:
        """The instance with the fewest requests."""
        return min(view.instances, key=lambda load: load.batch_size + load.waiting_requests).instance.instance_id
