"""Prefix affinity with a limit on the load it may pile up."""

from kairos.scheduler_core.policy import PrefillPlacementView


class TokenLoad:
    """The instance with the longest cached prefix, unless it holds more than `limit_tokens` in flight.

    Where all are over the limit, or none has a hit, the fewest tokens in flight decide.

    Args:
        limit_tokens: load above which a hit no longer attracts, at least 1.

    Source: the token-load scorer beside the prefix scorer of llm-d's default profile since 2026-08.
    """

    def __init__(self, limit_tokens: int = 32_768) -> None:
        if limit_tokens < 1:
            raise ValueError(f"limit_tokens is {limit_tokens}; use 1 or more")
        self.limit_tokens = limit_tokens

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """The largest hit among instances under the limit, else the least loaded."""
        open_ones = [load for load in view.instances if load.tokens_in_flight <= self.limit_tokens]
        best = min(
            open_ones or view.instances,
            key=lambda load: (-load.cached_tokens if open_ones else 0, load.tokens_in_flight),
        )
        return best.instance.instance_id
