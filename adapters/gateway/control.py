"""What the gateway gets from the control plane, and what it sends there, in a thread beside the event loop.

Away: the last strategy and models stay in force, requests that have ended are kept up to a limit; both are counted.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable

import msgspec

from kairos.adapters.control_plane import ControlPlane, NewStepTimes
from kairos.adapters.dataplane.arms import Active
from kairos.adapters.dataplane.reports import SlotReport
from kairos.adapters.gateway.calls import Call, Met, Outcome
from kairos.scheduler_core.config import ControlPlane as Settings
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.slo import NO_TARGET_S, tpot_s
from kairos.scheduler_core.telemetry import RequestRow, RequestStatus

PERIOD_S = 1.0
"""So that another strategy is in force within two seconds, however long the answer takes."""

_log = logging.getLogger(__name__)

News = Active | NewStepTimes
_active = msgspec.json.Decoder(Active)


class ControlLink:
    """Speaks with the control plane every second.

    Args:
        profiles: of the fleet, at least one.
        take: told every piece of news, in the event loop's thread.
    """

    def __init__(self, settings: Settings, profiles: list[Profile], take: Callable[[News], None]) -> None:
        key = settings.key.get_secret_value() if settings.key else ""
        run = f"gateway-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.plane = ControlPlane(settings.url, profiles[0], run, key, profiles[1:], self._hear)
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._ending = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="kairos-control-plane", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Send what is left, for at most a few seconds."""
        self._ending.set()
        await asyncio.to_thread(self._thread.join, 5.0)

    def report(self, experiment: str, report: SlotReport) -> None:
        """Send what is known of a slot of an experiment with the next exchange."""
        path = f"/experiments/{experiment}/reports/{self.plane.run}"
        self.plane.note_document(f"{experiment} {report.slot_start_s}", path, msgspec.json.encode(report))

    def _hear(self, answer: bytes) -> None:
        """Hand on what is active: even an answer that says nothing new says that the control plane is there."""
        self._loop.call_soon_threadsafe(self._take, _active.decode(answer))

    def _run(self) -> None:
        while not self._ending.is_set():
            self._exchange()
            if self.plane.news:
                self._loop.call_soon_threadsafe(self._take_up)
            self._ending.wait(PERIOD_S)
        self._exchange()

    def _exchange(self) -> None:
        try:
            self.plane.exchange()
        except Exception as problem:  # the thread's top: what it does next time may work
            if not self._told:
                _log.warning("control plane: %s; said once", problem, exc_info=problem)
            self._told = True

    def _take_up(self) -> None:
        while self.plane.news:
            news = self.plane.news.popleft()
            assert isinstance(news, NewStepTimes)  # strategies are heard
            self._take(news)


_STATUS: dict[Outcome, RequestStatus] = {
    Outcome.FINISHED: "finished",
    Outcome.REFUSED: "rejected",
    Outcome.FAILED: "failed",
    Outcome.CLIENT_LEFT: "unfinished",
}
_NOTHING_MET = Met(0, 0, 0, 0, 0.0)


def request_row(call: Call, outcome: Outcome, profile: Profile, model_version: str, arrived_at_s: float) -> RequestRow:
    """A request that has ended, as telemetry; its arrival is on the control plane's clock."""
    met = call.met or _NOTHING_MET
    usage = call.usage
    prompt_tokens = usage.prompt_tokens if usage is not None and usage.prompt_tokens else call.prompt_tokens
    cached = (usage.cached_tokens or 0) if usage is not None else 0
    ttft_s = call.first_token_s - call.arrival_s if call.first_token_s and call.body.stream else 0.0
    several = ttft_s and call.output_tokens > 1 and call.last_token_s > call.first_token_s
    return RequestRow(
        input_tokens=prompt_tokens,
        prefix_hit_ratio=min(cached / prompt_tokens, 1.0),
        kv_cache_usage=met.kv_usage_share,
        requests_running=met.running,
        requests_waiting=met.waiting,
        prefill_tokens_in_flight=met.prefill_tokens_in_flight,
        decode_tokens_in_flight=met.decode_tokens_in_flight,
        ttft_ms=_ms(ttft_s),
        tpot_ms=_ms(tpot_s(call.first_token_s, call.last_token_s, float(call.output_tokens)) if several else 0.0),
        predicted_ttft_ms=_ms(call.predicted_ttft_s or 0.0),
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
        arrived_at_s=arrived_at_s,
        status=_STATUS[outcome],
        ttft_target_ms=_ms(call.ttft_target_s),
        tpot_target_ms=_ms(call.tpot_target_s),
        wait_ms=max(call.dispatch_s - call.arrival_s, 0.0) * 1e3 if call.dispatch_s else None,
        strategy=call.strategy,
        session=call.session,
        pool=call.part if call.session else None,  # type: ignore[arg-type]  # 0 or 1
        prefill_instance=call.prefill.instance_id if call.prefill else "",
        decode_instance=call.decode.instance_id if call.decode else "",
    )


def _ms(seconds: float) -> float | None:
    """Milliseconds; None for what did not happen, or is no target."""
    return seconds * 1e3 if 0.0 < seconds < NO_TARGET_S else None
