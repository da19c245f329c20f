"""Best fit: fill the fullest instance that still keeps its targets."""

from kairos.scheduler_core.policy import DecodeLoad, DecodePlacementView


class BestFit:
    """The instance with the longest predicted step that stays within every target; if none does, the shortest step.

    Source: the placement rule of PolyServe.
    """

    def place_decode(self, view: DecodePlacementView) -> str:
        """The fullest instance that stays in time."""
        request = view.request

        def rank(load: DecodeLoad) -> tuple[bool, float]:
            step_s = load.instance.step_times.decode_step_s(
                load.batch_size + load.waiting_requests + 1,
                load.sum_context_tokens + load.waiting_context_tokens + request.context_tokens,
            )
            late = step_s > min(load.tightest_tpot_s, request.tpot_target_s)
            return late, step_s if late else -step_s

        return min(view.instances, key=rank).instance.instance_id
