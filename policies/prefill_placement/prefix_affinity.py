"""Where most of the prompt is cached."""

from kairos.scheduler_core.policy import PrefillPlacementView


class PrefixAffinity:
    """The instance with the longest cached prefix; among equals the one with the fewest tokens in flight."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The instance with the largest hit."""
        return min(view.instances, key=lambda load: (-load.cached_tokens, load.tokens_in_flight)).instance.instance_id
