"""Late binding: nobody is bound before an instance is free for it."""

from kairos.scheduler_core.policy import PrefillPlacementView


class Late:
    """Leave the request in the shared queue; the instance that is free first takes it. The default."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """None: the shared queue."""
        return None
