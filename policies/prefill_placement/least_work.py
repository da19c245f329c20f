"""Least predicted work, the request itself included."""

from kairos.scheduler_core.policy import PrefillPlacementView


class LeastWork:
    """The instance that would finish the request first: outstanding seconds plus its own there (ties: the first)."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The instance that is done with it first."""
        return min(view.instances, key=lambda load: load.outstanding_s + load.prefill_s).instance.instance_id
