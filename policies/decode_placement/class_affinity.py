"""One instance, one class: tight and relaxed targets kept apart."""

from kairos.scheduler_core.policy import DecodeLoad, DecodePlacementView


class ClassAffinity:
    """The least used instance among those whose tightest target is nearest to the request's own.

    A tight request then does not slow a relaxed batch down, nor is it slowed by one. An instance counts as another
    class when the targets differ by more than `tolerance`; a stranger is chosen only when it uses less than
    `spill_share` of what the best of its own class uses, so that no class is left alone with a full instance.

    Args:
        tolerance: relative difference of targets within one class, 0 or more.
        spill_share: 0 (never spill) to 1 (ignore classes).
    """

    def __init__(self, tolerance: float = 0.1, spill_share: float = 0.5) -> None:
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; use 0 or more")
        if not 0 <= spill_share <= 1:
            raise ValueError(f"spill_share is {spill_share}; use 0 to 1")
        self.tolerance = tolerance
        self.spill_share = spill_share

    def place_decode(self, view: DecodePlacementView) -> str:
        """The least used instance of the request's class, or one that spills over."""
        target_s = view.request.tpot_target_s

        def used_share(load: DecodeLoad) -> float:
            step_s = load.instance.step_times.decode_step_s(
                load.batch_size + load.waiting_requests + 1,
                load.sum_context_tokens + load.waiting_context_tokens + view.request.context_tokens,
            )
            return step_s / min(load.tightest_tpot_s, target_s)

        def same_class(load: DecodeLoad) -> bool:
            empty = load.batch_size + load.waiting_requests == 0
            return empty or abs(load.tightest_tpot_s - target_s) <= self.tolerance * target_s

        best = min(view.instances, key=used_share)
        own = [load for load in view.instances if same_class(load)]
        if own:
            home = min(own, key=used_share)
            if used_share(best) >= self.spill_share * used_share(home):
                best = home
        return best.instance.instance_id
