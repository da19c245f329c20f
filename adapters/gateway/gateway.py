"""The gateway as a whole: its parts, its start and end, a fleet and a strategy that change while it runs."""

import asyncio
import logging
import ssl
import time
from collections.abc import Coroutine, Iterator

from kairos.adapters.control_plane import NewStepTimes
from kairos.adapters.dataplane.reports import SlotReport
from kairos.adapters.gateway.app import App, limits_of
from kairos.adapters.gateway.calls import Call, Outcome
from kairos.adapters.gateway.control import ControlLink, News, request_row
from kairos.adapters.gateway.counting import TokenCounter
from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.experiments import Player
from kairos.adapters.gateway.fleet import Member, StepTimesOf, instance_of, members_of
from kairos.adapters.gateway.health import Health
from kairos.adapters.gateway.instances import LiveInstance, State
from kairos.adapters.gateway.leases import expired_error
from kairos.adapters.gateway.metrics import GatewayMetrics, Labels, exposition, instance_gauges
from kairos.adapters.gateway.relay import Relay
from kairos.adapters.gateway.scheduling import Scheduler
from kairos.adapters.gateway.tokens import TokenEstimates
from kairos.adapters.gateway.trust import Trust
from kairos.adapters.http_server import HttpServer
from kairos.scheduler_core.config import GatewaySettings, Settings
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConfigError, KairosError

_log = logging.getLogger(__name__)

_SWEEP_S = 0.1
_RESOLVE_S = 10.0
"""Between two looks at what stands behind `dns+` addresses."""


class Gateway:
    """One gateway process's worth of state. Made, started and stopped in one event loop.

    Raises:
        UnknownPolicyError, ConfigError: the active strategy cannot be built.
    """

    def __init__(self, settings: Settings, step_times_of: StepTimesOf) -> None:
        self.settings = settings
        self._step_times_of = step_times_of
        gateway = settings.gateway
        strategy = settings.strategies[settings.active].as_strategy(settings.active)
        self.scheduler = Scheduler(strategy, settings.guards, time.monotonic, gateway.max_waiting)
        self.metrics = GatewayMetrics()
        self.health = Health(gateway.health_s, self._changed, time.monotonic)
        self.relay = Relay(self.scheduler, gateway.timeouts, gateway.kv_lease_s, self.health.suspect)
        self.app = App(
            gateway,
            Trust(gateway, settings.slo),
            self.scheduler,
            self.relay,
            TokenEstimates(gateway.media_tokens),
            _counters_of(gateway),
            self.metrics,
            self._ended,
            self._metrics_text,
        )
        self._listener_tls = _listener_tls(gateway)
        self._engine_tls = ssl.create_default_context(cafile=gateway.engine_ca) if gateway.engine_ca else None
        self.server = HttpServer(self.app, limits_of(gateway), gateway.host, gateway.port, self._listener_tls)
        self._members: dict[str, Member] = {}
        self._numbers: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.control: ControlLink | None = None
        self.stalled = 0
        """Connections that were cut because their clients did nothing for too long."""
        self._models: dict[str, NewStepTimes] = {}
        """Those that were pulled, by profile id."""
        key = settings.service.schedule_key
        self.player = Player(
            strategy, key.get_secret_value().encode() if key else b"", self.scheduler, self.app.calls, self._report
        )

    async def start(self) -> None:
        """Look for the engines, then listen; requests are taken as soon as an engine is well.

        Raises:
            ConfigError: the fleet has no engine.
            OSError: the port cannot be had.
        """
        await self._bring_fleet_to(await members_of(self.settings))
        await self.server.start()
        self._in_background(self._sweep())
        if self.settings.gateway.control_plane is not None:
            profiles = dict.fromkeys(instance.profile for instance in self.scheduler.instances.values())
            self.control = ControlLink(self.settings.gateway.control_plane, list(profiles), self._take)
            self._in_background(self.player.run())
        if any(group.url and group.url.startswith("dns+") for _, _, group in self.settings.fleet.groups()):
            self._in_background(self._resolve())

    async def stop(self) -> None:
        """Take nothing new, let what there is end for `timeouts.drain_s`, then end."""
        self.app.draining = True
        await self.server.stop(self.settings.gateway.timeouts.drain_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.control is not None:
            await self.control.close()
        for instance in list(self.scheduler.instances.values()):
            await self.health.forget(instance)
            instance.close()

    async def reload(self, settings: Settings) -> None:
        """Go on with other settings: fleet, strategy, SLO classes, keys, timeouts, certificate; not host and port.

        Raises:
            KairosError: they cannot be used; nothing has changed.
        """
        strategy = settings.strategies[settings.active].as_strategy(settings.active).check()
        members = await members_of(settings, self._members.values())
        trust = Trust(settings.gateway, settings.slo)
        counters = await asyncio.to_thread(_counters_of, settings.gateway)
        before, self.settings = self.settings, settings
        try:
            await self._bring_fleet_to(members)
        except BaseException:
            self.settings = before
            raise
        self.app.trust = trust
        self.app.counters = counters
        self.app.settings = settings.gateway
        self.server.limits = limits_of(settings.gateway)
        self.relay.timeouts = settings.gateway.timeouts
        self.player.configure(strategy)
        if self._listener_tls is not None and settings.gateway.tls is not None:
            self._listener_tls.load_cert_chain(settings.gateway.tls.certificate, settings.gateway.tls.key)

    # -- the control plane

    def _take(self, news: News) -> None:
        """Go on with a strategy or a model that was pulled."""
        if not isinstance(news, NewStepTimes):
            self.player.hear(news)
            self.app.divide = self.player.divide if self.player.divides else None
            return
        self._models[news.profile_id] = news
        for instance in self.scheduler.instances.values():
            if instance.profile.profile_id == news.profile_id:
                instance.predict_with(news.step_times, news.version)
        self.scheduler.rebuild()

    def _report(self, experiment: str, report: SlotReport) -> None:
        if self.control is not None:
            self.control.report(experiment, report)

    # -- the fleet

    async def _bring_fleet_to(self, members: list[Member]) -> None:
        wanted = {member.url: member for member in members}
        known = {name: member for name, member in self._members.items()}
        fresh = [m for url, m in wanted.items() if m not in known.values()]
        instances = [self._new(member) for member in fresh]  # all of them can be made, or nothing changes
        for instance, member in zip(instances, fresh, strict=True):
            self._members[instance.instance_id] = member
            self.scheduler.instances[instance.instance_id] = instance
            instance.open()
            self.health.watch(instance)
        for name, member in known.items():
            if wanted.get(member.url) != member:
                self._in_background(self._drain(self.scheduler.instances[name]))

    def _new(self, member: Member) -> LiveInstance:
        number = self._numbers.get(member.role, 0)
        instance = instance_of(self.settings, member, number, self._step_times_of, self._engine_tls)
        if (pulled := self._models.get(instance.profile.profile_id)) is not None:
            instance.predict_with(pulled.step_times, pulled.version)
        self._numbers[member.role] = number + 1
        return instance

    async def _drain(self, instance: LiveInstance) -> None:
        """Let an instance end what it has, then forget it; what is left ends as `instance_gone`."""
        del self._members[instance.instance_id]
        instance.state = State.DRAINING
        self.scheduler.rebuild()
        until_s = time.monotonic() + self.settings.gateway.timeouts.drain_s
        while instance.requests and time.monotonic() < until_s:
            await asyncio.sleep(_SWEEP_S)
        for call in self._calls_on(instance):
            call.interrupt(CallError(502, "instance_gone", "the instance was removed", may_retry=True))
        await self.health.forget(instance)
        del self.scheduler.instances[instance.instance_id]
        self.scheduler.rebuild()
        while instance.requests:
            await asyncio.sleep(_SWEEP_S)
        instance.close()

    def _changed(self, instance: LiveInstance) -> None:
        self.scheduler.rebuild()
        self.player.turn()  # a fleet that loses an instance may not be divided any more
        if instance.state is State.DOWN:  # one that hangs would keep its requests until their time is over
            self.player.lost(instance)
            for call in self._calls_on(instance):
                call.interrupt(CallError(502, "engine_lost", "the engine does not answer any more", may_retry=True))

    def _calls_on(self, instance: LiveInstance) -> list[Call]:
        """Requests that the instance works on and that have not noticed a failure of it themselves."""
        return [
            call
            for call in self.app.calls.values()
            if (call.decode is instance or (call.prefill is instance and call.decode is None))
            and instance.instance_id not in call.failed_on
        ]

    async def _resolve(self) -> None:
        while True:
            await asyncio.sleep(_RESOLVE_S)
            try:
                await self._bring_fleet_to(await members_of(self.settings, self._members.values()))
            except KairosError as problem:
                _log.error("the fleet stays as it is: %s", problem)

    # -- time

    async def _sweep(self) -> None:
        """End what is out of time, or whose client has left or does nothing."""
        looked_s = time.monotonic()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = time.monotonic()
            idle_s = self.settings.gateway.timeouts.idle_s
            if now_s >= looked_s + min(1.0, idle_s / 4):  # there may be thousands
                looked_s = now_s
                self.stalled += self.server.sweep(now_s)
            for call in list(self.app.calls.values()):
                if now_s > call.total_deadline_s:
                    call.interrupt(CallError(504, "deadline", "the request took longer than timeouts.total_s"))
                elif now_s > call.deadline_s:
                    call.interrupt(CallError(504, "engine_timeout", "the engine did not answer in time"))
                elif call.grant is not None and call.decode is not None and call.decode.decode is not None:
                    call.grant.renew(call.decode.decode.last_token_s)
                    if call.grant.expired(now_s):
                        call.interrupt(expired_error())

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- what is told

    def _ended(self, call: Call, outcome: Outcome, code: str) -> None:
        self.metrics.ended(call, outcome, code)
        self.player.ended(call, outcome)
        if self.control is not None:
            serving = call.prefill or next((i for i in self.scheduler.instances.values() if i.prefill), None)
            profile, version = (serving.profile, serving.model_version) if serving else (Profile("", call.model), "")
            arrived_at_s = self.player.at(call.arrival_s)
            self.control.plane.note_request(request_row(call, outcome, profile, version, arrived_at_s))

    def _metrics_text(self) -> str:
        return exposition(self.metrics, self._gauges())

    def _gauges(self) -> Iterator[tuple[str, str, Labels, float]]:
        scheduler = self.scheduler
        yield "kairos_gateway_waiting", "requests that wait in the gateway", (), len(scheduler.waiting)
        yield "kairos_gateway_running", "requests that have not ended", (), len(self.app.calls) + self.app.others
        yield "kairos_gateway_client_connections", "open connections of clients", (), self.server.connections
        yield "kairos_gateway_stalled_clients_total", "connections cut: nothing came or went", (), self.stalled
        yield "kairos_gateway_retries_total", "requests that were tried once more", (), self.relay.retries
        for name in {decider.strategy.name for decider in scheduler.deciders}:
            text = "the strategy in force, or those of both parts of the fleet"
            yield "kairos_gateway_strategy", text, (("strategy", name),), 1
        for policy, count in scheduler.fallbacks.items():
            text = "decisions in which a policy was replaced"
            yield "kairos_gateway_fallbacks_total", text, (("policy", policy),), count
        for profile_id, pulled in self._models.items():
            labels = (("profile", profile_id), ("version", pulled.version))
            yield "kairos_gateway_model", "the model in force, once one was pulled", labels, 1
        if self.control is not None:
            plane = self.control.plane
            age_s = float("inf") if plane.reached_s is None else time.time() - plane.reached_s
            yield "kairos_gateway_control_plane_age_seconds", "since it answered", (), age_s
            if experiment := self.player.experiment:
                yield "kairos_gateway_experiment", "the one it takes part in", (("experiment", experiment),), 1
            plane.counts["refused strategies"] = self.player.refused
            for what, count in sorted(plane.counts.items()):
                name, text = "kairos_gateway_control_plane_total", "rows and answers, by what became of them"
                yield name, text, (("what", what),), count
        yield from instance_gauges(scheduler.instances.values())
        told = [(i.instance_id, i.prefill.kv_events) for i in scheduler.instances.values() if i.prefill]
        readers = [(instance_id, reader) for instance_id, reader in told if reader is not None]
        for instance_id, reader in readers:
            text = "blocks in its KV cache, by its events"
            yield "kairos_gateway_kv_blocks", text, (("instance", instance_id),), len(reader.stored)
        for instance_id, reader in readers:
            for what, count in sorted(reader.counts.items()):
                labels = (("instance", instance_id), ("what", what))
                yield "kairos_gateway_kv_events_total", "batches of KV events", labels, count


def _counters_of(gateway: GatewaySettings) -> dict[str, TokenCounter]:
    by_folder = {folder: TokenCounter(folder) for folder in set(gateway.tokenizers.values())}
    return {model: by_folder[folder] for model, folder in gateway.tokenizers.items()}


def _listener_tls(gateway: GatewaySettings) -> ssl.SSLContext | None:
    if gateway.tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(gateway.tls.certificate, gateway.tls.key)
    except (OSError, ssl.SSLError) as problem:
        raise ConfigError(f"gateway.tls: the certificate or its key cannot be read ({problem})") from None
    return context
