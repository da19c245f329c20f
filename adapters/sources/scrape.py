"""Asks the engines of a fleet, again and again, and pushes what they say."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Literal
from urllib.parse import urlsplit

import httpx

from kairos.adapters.sources.forward_pass import Subscriber
from kairos.adapters.sources.loads import reading_of_loads
from kairos.adapters.sources.metrics import SGLANG, VLLM, reading_of_metrics
from kairos.adapters.sources.push import Push
from kairos.adapters.sources.readings import Reading, sample_of
from kairos.scheduler_core.config import Group, Settings
from kairos.scheduler_core.errors import ConfigError, TelemetryError
from kairos.scheduler_core.telemetry import SampleRow

TIMEOUT_S = 2.0
"""For one answer of an engine, from the connection to its last byte."""
LARGEST_ANSWER_BYTES = 16 * 2**20
_AT_ONCE = 32


_WAYS: dict[str, tuple[tuple[str, Callable[[bytes], Reading]], ...]] = {
    "vllm": (("/metrics", partial(reading_of_metrics, VLLM)),),
    "sglang": (("/metrics", partial(reading_of_metrics, SGLANG)), ("/v1/loads", reading_of_loads)),
}
"""By engine: where it says something, and how that is read; the later one holds where both say the same."""


@dataclass(frozen=True, slots=True)
class Target:
    """An engine that is asked."""

    instance: str
    engine: Literal["vllm", "sglang"]
    url: str


def live_groups(settings: Settings) -> list[tuple[str, Group]]:
    """Groups of the fleet that have an address and an engine, under the name of their first instance.

    Raises:
        ConfigError: there is none.
    """
    found: list[tuple[str, Group]] = []
    for role, groups in (("prefill", settings.fleet.prefill), ("decode", settings.fleet.decode)):
        index = 0
        for group in groups:
            if group.url and group.engine:
                found.append((f"{role}-{index}", group))
            index += group.count
    if not found:
        raise ConfigError("no group of the fleet has url and engine (vllm or sglang), so there is nothing to ask")
    return found


def targets_of(groups: Sequence[tuple[str, Group]]) -> Iterator[Target]:
    """The engines; `dns+http://name:port` is looked up now and stands for every address behind the name."""
    for instance, group in groups:
        if group.url is None or group.engine is None:
            continue
        if not group.url.startswith("dns+"):
            yield Target(instance, group.engine, group.url)
            continue
        address = urlsplit(group.url.removeprefix("dns+"))
        for host in _addresses(address.hostname or "", address.port):
            yield Target(f"{instance}@{host}", group.engine, f"{address.scheme}://{host}:{address.port or 80}")


def _addresses(name: str, port: int | None) -> list[str]:
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = sorted({str(place[0]) for *_, place in found})
    return [f"[{host}]" if ":" in host else host for host in hosts]


class Scraper:
    """Asks engines and remembers what they said last."""

    def __init__(self) -> None:
        self._client = httpx.Client(timeout=TIMEOUT_S)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kairos-scrape")
        self._before: dict[str, tuple[float, Reading]] = {}
        self.problems: dict[str, str] = {}
        """By instance, why it said nothing the last time."""

    def samples(self, targets: Sequence[Target]) -> list[SampleRow]:
        """One of each engine that answers, asked at the same time."""
        found = [sample for sample in self._pool.map(self._sample, targets) if sample is not None]
        asked = {target.instance for target in targets}
        for gone in self.problems.keys() - asked:
            del self.problems[gone]
        for gone in self._before.keys() - asked:
            del self._before[gone]
        return found

    def close(self) -> None:
        """Let go of connections and threads."""
        self._pool.shutdown()
        self._client.close()

    def _sample(self, target: Target) -> SampleRow | None:
        try:
            reading = self._reading(target)
        except (TelemetryError, httpx.HTTPError, httpx.InvalidURL) as error:
            self.problems[target.instance] = str(error) or type(error).__name__
            return None
        self.problems.pop(target.instance, None)
        now_s = time.monotonic()
        before_s, before = self._before.get(target.instance, (now_s, None))
        self._before[target.instance] = now_s, reading
        return sample_of(target.instance, target.engine, time.time(), reading, before, now_s - before_s)

    def _reading(self, target: Target) -> Reading:
        """What it says in all of its ways, or in those that are there.

        Raises:
            TelemetryError, httpx.HTTPError: it says nothing that can be read.
        """
        found, problem = Reading(), TelemetryError("it says nothing")
        for path, reading_of in _WAYS[target.engine]:
            try:
                found |= reading_of(self._get(target, path))
            except TelemetryError as error:
                problem = error
        if not found:
            raise problem
        return found

    def _get(self, target: Target, path: str) -> bytes:
        """An answer in time and of a size that can be.

        Raises:
            TelemetryError, httpx.HTTPError: there is none.
        """
        until_s = time.monotonic() + TIMEOUT_S
        body = bytearray()
        with self._client.stream("GET", target.url.rstrip("/") + path) as answer:
            if not answer.is_success:
                raise TelemetryError(f"{path} is answered {answer.status_code}")
            for part in answer.iter_bytes():
                body += part
                if len(body) > LARGEST_ANSWER_BYTES:
                    raise TelemetryError(f"the answer of {path} is longer than {LARGEST_ANSWER_BYTES} bytes")
                if time.monotonic() > until_s:
                    raise TelemetryError(f"the answer of {path} takes longer than {TIMEOUT_S:g} s")
        return bytes(body)


class Telling:
    """Says of each thing what is wrong with it when that changes, not every time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: dict[str, str] = {}

    def now(self, problems: dict[str, str]) -> None:
        """What is wrong now, by what it is wrong with."""
        for name, problem in problems.items():
            if self._told.get(name) != problem:
                self._tell(f"{name}: {problem}")
        for name in self._told.keys() - problems.keys():
            self._tell(f"{name}: answers again")
        self._told = dict(problems)


def scrape(
    settings: Settings,
    push: Push,
    every_s: float,
    rounds: int | None,
    stopped: Event,
    tell: Callable[[str], None],
) -> dict[str, int]:
    """Ask the engines of a configuration every so often, and push what they say, until told to stop.

    Args:
        settings: the configuration.
        push: where rows go.
        every_s: from the beginning of a round to that of the next.
        rounds: how many; None: until `stopped`.
        stopped: ends it after the round in work.
        tell: hears what is wrong, and that it is right again.

    Returns:
        Rows stored, rejected and dropped, and forward passes missed and unreadable.

    Raises:
        ConfigError: nothing to ask, an address that cannot be, or a key that is refused.
    """
    groups = live_groups(settings)
    started = f"live {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
    subscribers = [
        Subscriber(group.forward_pass, settings.profiles[group.profile].as_profile(), f"{started} {instance}")
        for instance, group in groups
        if group.forward_pass
    ]
    scraper, telling = Scraper(), Telling(tell)
    done = 0
    try:
        while not stopped.is_set():
            began_s = time.monotonic()
            push.add("samples", scraper.samples(list(targets_of(groups))))
            for subscriber in subscribers:
                push.add("steps", subscriber.steps())
            push.flush()
            telling.now(scraper.problems | ({"control plane": push.problem} if push.problem else {}))
            done += 1
            if done == rounds:
                break
            stopped.wait(max(0.0, every_s - (time.monotonic() - began_s)))
    finally:
        scraper.close()
        for subscriber in subscribers:
            subscriber.close()
    missed = sum((subscriber.counts for subscriber in subscribers), Counter[str]())
    return dict(push.counts + missed) | ({"undelivered": push.waiting_rows} if push.waiting_rows else {})
