"""What the gateway gets from the control plane, and what it sends there, in a thread beside the event loop.

Away: the last strategy and models stay in force, requests that have ended are kept up to a limit; both are counted.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable

from kairos.adapters.control_plane import ControlPlane, NewStepTimes, NewStrategy
from kairos.adapters.gateway.calls import Call
from kairos.scheduler_core.config import ControlPlane as Settings
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import tpot_s
from kairos.scheduler_core.telemetry import RequestRow

PERIOD_S = 2.0

_log = logging.getLogger(__name__)

News = NewStrategy | NewStepTimes


class ControlLink:
    """Speaks with the control plane every two seconds.

    Args:
        profiles: of the fleet, at least one.
        take: told every piece of news, in the event loop's thread.
    """

    def __init__(self, settings: Settings, profiles: list[Profile], take: Callable[[News], None]) -> None:
        key = settings.key.get_secret_value() if settings.key else ""
        run = f"gateway-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.plane = ControlPlane(settings.url, profiles[0], run, key, profiles[1:])
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kairos-control-plane", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Send what is left, for at most a few seconds."""
        self._ending.set()
        await asyncio.to_thread(self._thread.join, 5.0)

    def _run(self) -> None:
        told = False
        while True:
            ending = self._ending.wait(0.0 if not self.plane.counts else PERIOD_S)
            try:
                self.plane.exchange()
            except Exception as problem:  # the thread's top: what it does next time may work
                if not told:
                    _log.warning("control plane: %s; said once", problem, exc_info=problem)
                told = True
            if ending:
                return
            if self.plane.news:
                self._loop.call_soon_threadsafe(self._take_up)

    def _take_up(self) -> None:
        while self.plane.news:
            self._take(self.plane.news.popleft())


def request_row(call: Call, profile: Profile, model_version: str) -> RequestRow | None:
    """A request that has ended, as telemetry; None for one that was never sent to an engine."""
    met = call.met
    if met is None:
        return None
    ttft_s = call.first_token_s - call.arrival_s if call.first_token_s else 0.0
    several = call.body.stream and call.output_tokens > 1 and call.last_token_s > call.first_token_s
    tpot = tpot_s(call.first_token_s, call.last_token_s, float(call.output_tokens)) if several else 0.0
    counted = call.usage
    cached = counted.cached_tokens if counted is not None else None
    prompt_tokens = counted.prompt_tokens if counted is not None and counted.prompt_tokens else call.prompt_tokens
    return RequestRow(
        input_tokens=prompt_tokens,
        prefix_hit_ratio=min((cached or 0) / max(prompt_tokens, 1), 1.0),
        kv_cache_usage=met.kv_usage_share,
        requests_running=met.running,
        requests_waiting=met.waiting,
        prefill_tokens_in_flight=met.prefill_tokens_in_flight,
        decode_tokens_in_flight=met.decode_tokens_in_flight,
        ttft_ms=ttft_s * 1e3 if ttft_s > 0 and call.body.stream else None,
        tpot_ms=tpot * 1e3 if tpot > 0 else None,
        predicted_ttft_ms=call.predicted_ttft_s * 1e3 if call.predicted_ttft_s else None,
        model_version=model_version,
        output_tokens=call.output_tokens,
        request_id=call.request_id,
        tenant=call.tenant,
        slo_class=call.slo_class,
        gpu=profile.gpu,
        model=profile.model,
        precision=profile.precision,
        tp=profile.tp,
        ep=profile.ep,
        engine=profile.engine,
    )
