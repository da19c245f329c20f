"""A strategy replayed on recorded arrivals: what a live experiment subtracts, and what an offered load means."""

import numpy as np

from kairos.adapters.simulator.fleet import SimulatedFleet, build_fleet
from kairos.adapters.simulator.run import Knobs, simulate
from kairos.adapters.simulator.tables import Workload
from kairos.predictors.profiles import step_times_of
from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.replay import Arrivals, Replayed
from kairos.scheduler_core.strategy import Strategy


class SimulatedReplay:
    """A `Replay` on one simulated fleet: steps take as long as predicted. Equal arrivals give equal answers."""

    def __init__(self, fleet: SimulatedFleet, deferred_share: float) -> None:
        self._fleet = fleet
        self._knobs = Knobs(deferred_share=deferred_share)

    def __call__(self, strategy: Strategy, arrivals: Arrivals) -> Replayed:
        """What became of each arrival; the fleet is idle before the first.

        Raises:
            UnknownPolicyError, ConfigError: the strategy cannot be built.
        """
        requests = simulate(_workload(arrivals), self._fleet, strategy, self._knobs).requests
        wait_s = requests.prefill_start_s - arrivals.arrival_s
        return Replayed(requests.slo_met, np.where(np.isnan(wait_s), np.inf, wait_s))


def replay_on(settings: Settings) -> SimulatedReplay | None:
    """The replay on a configuration's fleet; None where it has no prefill or no decode instance.

    Raises:
        ConfigError: step times of the fleet cannot be loaded.
    """
    if not settings.fleet.prefill or not settings.fleet.decode:
        return None
    return SimulatedReplay(build_fleet(settings, step_times_of), settings.guards.deferred_share)


def _workload(arrivals: Arrivals) -> Workload:
    n = len(arrivals)
    return Workload(
        trace="live",
        request_id=range(n),
        arrival_s=arrivals.arrival_s,
        prompt_tokens=arrivals.prompt_tokens,
        output_tokens=arrivals.output_tokens,
        ttft_target_s=arrivals.ttft_target_s,
        tpot_target_s=arrivals.tpot_target_s,
        slo_class=["default"] * n,
        tenant=[""] * n,
        model=[""] * n,
    )
