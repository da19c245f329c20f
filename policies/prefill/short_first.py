"""Two classes, short prompts before long ones."""

from collections.abc import Sequence

from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.policy import PrefillView, first_by


class ShortFirst:
    """Prompts of at most `short_tokens` first, each class in arrival order.

    A long prompt that waited longer than `long_max_wait_s` counts as short.

    Source: the short/long queues of vLLM-Ascend.
    """

    def __init__(self, short_tokens: int = 256, long_max_wait_s: float = 10.0) -> None:
        if short_tokens < 0:
            raise ValueError(f"short_tokens is {short_tokens}; use 0 or more")
        if long_max_wait_s < 0:
            raise ValueError(f"long_max_wait_s is {long_max_wait_s}; use 0 or more")
        self.short_tokens = short_tokens
        self.long_max_wait_s = long_max_wait_s

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids by class, then arrival."""
        promoted_before_s = view.now_s - self.long_max_wait_s
        return first_by(
            view,
            view.waiting,
            lambda w: w.prompt_tokens > self.short_tokens and w.arrival_s >= promoted_before_s,
        )
