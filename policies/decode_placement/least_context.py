"""Fewest context tokens."""

from kairos.scheduler_core.policy import DecodePlacementView


class LeastContext:
    """The instance with the fewest context tokens, resident and waiting (ties: the first)."""

    def place_decode(self, view: DecodePlacementView) -> str:
        """The instance with the least context."""
        return min(
            view.instances, key=lambda load: load.sum_context_tokens + load.waiting_context_tokens
        ).instance.instance_id
