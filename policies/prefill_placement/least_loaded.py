"""Fewest tokens in flight."""

from kairos.scheduler_core.policy import PrefillPlacementView


class LeastLoaded:
    """The instance with the fewest prompt tokens still to compute (ties: the first)."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The least loaded instance."""
        return min(view.instances, key=lambda load: load.tokens_in_flight).instance.instance_id
