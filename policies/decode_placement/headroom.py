"""Largest relative headroom: the default."""

from kairos.scheduler_core.policy import DecodeLoad, DecodePlacementView


class Headroom:
    """The instance whose step, with the request, takes the smallest share of the tightest target there.

    Waiting requests count as resident; the request's own target counts too (ties: the first instance).
    """

    def place_decode(self, view: DecodePlacementView) -> str:
        """The instance with the most headroom left."""
        request = view.request

        def used_share(load: DecodeLoad) -> tuple[float, float]:
            step_s = load.instance.step_times.decode_step_s(
                load.batch_size + load.waiting_requests + 1,
                load.sum_context_tokens + load.waiting_context_tokens + request.context_tokens,
            )
            return step_s / min(load.tightest_tpot_s, request.tpot_target_s), step_s

        return min(view.instances, key=used_share).instance.instance_id
