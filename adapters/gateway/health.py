"""Is an engine there, which one, how busy: looked at again and again, and at once when it failed a request."""

import asyncio
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable

from kairos.adapters.gateway.errors import CallError
from kairos.adapters.gateway.instances import LiveInstance, Scraped, State
from kairos.adapters.http_client import HttpPool, UpstreamError

_log = logging.getLogger(__name__)

_PROBE_S = 2.0
"""An engine that takes longer to say that it is well is not."""

_MISSES = 3
"""Health checks in a row without an answer, after which an engine counts as hung; one alone may be a busy machine."""

KNOWN: dict[str, re.Pattern[str]] = {
    "vllm": re.compile(r"0\.(1[2-9]|2\d|3[0-3])\."),
    "sglang": re.compile(r"0\.5\."),
}
KNOWN_TEXT = "vLLM 0.12 to 0.33, SGLang 0.5"

_DOWN = {
    "connect": "cannot be reached",
    "lost": "its health check ends without an answer",
    "timeout": "its health check does not answer in time",
    "protocol": "its health check says that it is not well",
}

_SAMPLE = re.compile(r"^([a-z_]+:[a-z_]+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Health:
    """Looks after the instances.

    Args:
        every_s: between two looks.
        changed: told an instance whose state has changed.
    """

    def __init__(self, every_s: float, changed: Callable[[LiveInstance], None], clock: Callable[[], float]) -> None:
        self._every_s = every_s
        self._changed = changed
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hurry: dict[str, asyncio.Event] = {}
        self._generated: dict[str, float] = {}
        self._missed = Counter[str]()

    def watch(self, instance: LiveInstance) -> None:
        """Look after one more."""
        self._hurry[instance.instance_id] = asyncio.Event()
        self._tasks[instance.instance_id] = asyncio.get_running_loop().create_task(self._run(instance))

    async def forget(self, instance: LiveInstance) -> None:
        """Look after one less."""
        task = self._tasks.pop(instance.instance_id, None)
        self._hurry.pop(instance.instance_id, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def suspect(self, instance: LiveInstance, kind: str) -> None:
        """It failed a request: look at once; one that cannot be reached gets nothing until it can."""
        if kind == "connect" and instance.state is State.READY:
            self._set(instance, State.DOWN, _DOWN[kind])
        hurry = self._hurry.get(instance.instance_id)
        if hurry is not None:
            hurry.set()

    async def _run(self, instance: LiveInstance) -> None:
        hurry = self._hurry[instance.instance_id]
        while True:
            await self.look(instance)
            hurry.clear()
            try:
                async with asyncio.timeout(self._every_s):
                    await hurry.wait()
            except TimeoutError:
                pass
            else:  # do not ask a failing engine more than ten times a second
                await asyncio.sleep(min(0.1, self._every_s))

    async def look(self, instance: LiveInstance) -> None:
        """One look."""
        if instance.state is State.DRAINING:
            return
        try:
            status, _ = await _get(instance, b"/health")
            if status != 200:
                raise UpstreamError("protocol", f"its health check answers {status}")
            if not instance.version:
                await self._identify(instance)
            await self._scrape(instance)
        except CallError as problem:
            self._set(instance, State.REFUSED, problem.message)
        except UpstreamError as problem:
            self._missed[instance.instance_id] += problem.kind == "timeout"
            if problem.kind == "timeout" and self._missed[instance.instance_id] < _MISSES and instance.is_ready:
                return
            instance.version = ""  # it may come back as another
            self._set(instance, State.DOWN, _DOWN[problem.kind])
        else:
            self._missed[instance.instance_id] = 0
            self._set(instance, State.READY, "")

    def _set(self, instance: LiveInstance, state: State, problem: str) -> None:
        instance.problem = problem
        if instance.state in (state, State.DRAINING):
            return
        before, instance.state = instance.state, state
        if state is State.READY and instance.prefill is not None and instance.prefill.index is not None:
            instance.prefill.index.forget()
        level = logging.INFO if state is State.READY else logging.WARNING
        _log.log(level, "instance %s: %s -> %s %s", instance.instance_id, before, state, problem)
        self._changed(instance)

    async def _identify(self, instance: LiveInstance) -> None:
        """Which engine and version.

        Raises:
            CallError: one that Kairos does not know.
        """
        wanted = instance.group.engine
        for engine, path in (("vllm", b"/version"), ("sglang", b"/server_info")):
            if wanted in (None, engine):
                status, body = await _get(instance, path)
                version = _version(body) if status == 200 else ""
                if version:
                    if not KNOWN[engine].match(version):
                        raise CallError(503, "unknown_engine", f"{engine} {version} is not known; known: {KNOWN_TEXT}")
                    instance.engine, instance.version = engine, version
                    await self._ask_for_mooncake_id(instance)
                    return
        what = f"no {wanted}" if wanted else "no engine that Kairos knows"
        raise CallError(503, "unknown_engine", f"what answers is {what}; known: {KNOWN_TEXT}")

    async def _ask_for_mooncake_id(self, instance: LiveInstance) -> None:
        if instance.role != "prefill" or instance.handshake != "mooncake":
            return
        pool = HttpPool(instance.bootstrap_address, _PROBE_S)
        try:
            answer = await pool.send(b"GET", b"/query", first_byte_s=_PROBE_S)
            ranks = json.loads(await answer.body())
            instance.mooncake_engine_id = str(ranks["0"]["engine_id"])
        except (ValueError, KeyError, TypeError):
            raise UpstreamError("protocol", "its Mooncake bootstrap server does not say its engine_id") from None
        finally:
            pool.close()

    async def _scrape(self, instance: LiveInstance) -> None:
        status, body = await _get(instance, b"/metrics")
        if status != 200:
            return  # metrics may be switched off: what passes through the gateway is known anyway
        sums: dict[str, float] = {}
        for name, value in _SAMPLE.findall(body.decode("utf-8", "replace")):
            sums[name] = sums.get(name, 0.0) + _number(value)
        instance.scraped = scraped(instance.engine, sums)
        generated = sums.get(f"{instance.engine}:generation_tokens_total")
        if instance.decode is None or generated is None:
            return
        instance.decode.tells_steps = True
        if generated > self._generated.get(instance.instance_id, 0.0):
            instance.decode.last_token_s = self._clock()
        self._generated[instance.instance_id] = generated


def scraped(engine: str, sums: dict[str, float]) -> Scraped:
    """The load of an engine from its metrics, summed over their labels."""
    if engine == "sglang":
        return Scraped(
            int(sums.get("sglang:num_running_reqs", 0)),
            int(sums.get("sglang:num_queue_reqs", 0)),
            min(max(sums.get("sglang:token_usage", 0.0), 0.0), 1.0),
        )
    return Scraped(
        int(sums.get("vllm:num_requests_running", 0)),
        int(sums.get("vllm:num_requests_waiting", 0)),
        min(max(sums.get("vllm:kv_cache_usage_perc", 0.0), 0.0), 1.0),
        int(sums.get("vllm:nixl_num_kv_expired_reqs_total", 0)),
    )


def _number(text: str) -> float:
    """A sample's value; 0 for what is none."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _version(body: bytes) -> str:
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    version = told.get("version") if isinstance(told, dict) else None
    return version if isinstance(version, str) else ""


async def _get(instance: LiveInstance, path: bytes) -> tuple[int, bytes]:
    answer = await instance.http.send(b"GET", path, instance.key_header, first_byte_s=_PROBE_S, idle_s=_PROBE_S)
    return answer.status, await answer.body()
