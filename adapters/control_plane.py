"""The engine's side of the control plane: steps go there in batches, the strategy and models in force come from there.

`exchange` is called again and again from a thread of its own; the engine's thread only appends to a bounded queue and
looks whether there is news. With the control plane away the engine goes on with what it has: steps are kept up to a
limit, the oldest are dropped and counted.
"""

import gzip
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kairos.predictors.artifact import parse
from kairos.predictors.features import SCHEMA_HASH
from kairos.scheduler_core.domain import Profile, StepTimes
from kairos.scheduler_core.errors import ConfigError, InputError, KairosError
from kairos.scheduler_core.strategy import Strategy, parse_strategy
from kairos.scheduler_core.telemetry import StepRecord, StepRow

TIMEOUT_S = 2.0
KEPT_STEPS = 100_000
"""About half an hour of steps of 20 ms."""
BATCH_ROWS = 10_000
LARGEST_ANSWER_BYTES = 256 * 2**20
LOG_EVERY_S = 60.0
_REFUSED = (400, 404, 409, 413, 415, 422)
"""Answers after which the same batch would be refused again."""

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class ActiveStrategy(msgspec.Struct, frozen=True):
    """What `GET /strategies/active` answers, as far as it matters here."""

    name: str
    text: str
    version: int | str = 0
    generation: int = 0
    """Rises with every change; a replica may be behind."""


class ServingModel(msgspec.Struct, frozen=True):
    """One entry of `GET /models/serving`."""

    profile_id: str
    version: int | str
    schema_hash: str = ""
    """Empty where it does not say; the artifact does."""


class ServingModels(msgspec.Struct, frozen=True):
    """What `GET /models/serving` answers."""

    models: list[ServingModel] = []


class NewStrategy(NamedTuple):
    """The strategy that the control plane wants in force."""

    strategy: Strategy
    name: str


class NewStepTimes(NamedTuple):
    """A model that the control plane serves for this profile."""

    step_times: StepTimes
    version: str


class ControlPlane:
    """Speaks with one control plane for one engine.

    Args:
        url: its address.
        profile: of the engine.
        run: names this run of the engine; batches are numbered within it, so that a batch sent twice is stored once.
        api_key: sent as a bearer token when given.
    """

    def __init__(self, url: str, profile: Profile, run: str, api_key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the control plane's address is {url}; write http://HOST:PORT")
        self.url = url.rstrip("/")
        self.profile = profile
        self.run = run
        self.news: deque[NewStrategy | NewStepTimes] = deque()
        """What the engine's thread has not taken up yet."""
        self.counts: Counter[str] = Counter()
        """Rows pushed, dropped, refused; requests that failed; what was pulled or refused."""
        self.reached_s: float | None = None
        """When it answered last, UTC epoch."""
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._steps: deque[StepRecord] = deque()
        self._batch: tuple[str, Sequence[StepRecord]] | None = None
        self._batches = 0
        self._wait_until_s = 0.0
        self._strategy: ActiveStrategy | None = None
        self._model: ServingModel | None = None
        self._logged_s = float("-inf")

    def note(self, step: StepRecord) -> None:
        """Keep a step for the next batch; called by the engine's thread."""
        if len(self._steps) >= KEPT_STEPS:
            self._steps.popleft()
            self.counts["dropped steps"] += 1
        self._steps.append(step)

    def exchange(self) -> None:
        """Push what is there, pull what is new. Whatever fails is counted, said once a minute, and tried again."""
        for part in (self._pull_strategy, self._pull_model, self._push):
            try:
                part()
            except KairosError as problem:
                self._failed("refused", problem)
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as problem:
                self._failed("failed", problem)
                return  # it is away: no use in asking for more now

    # -- telemetry

    def _push(self) -> None:
        if time.monotonic() < self._wait_until_s:
            return
        while self._batch is not None or self._steps:
            if self._batch is None:
                rows = [self._steps.popleft() for _ in range(min(BATCH_ROWS, len(self._steps)))]
                self._batches += 1
                self._batch = f"{self.run}/{self._batches}", rows
            name, steps = self._batch
            body = gzip.compress(b"\n".join(_encoder.encode(row_of(step, self.profile)) for step in steps), 1)
            headers = {
                "content-type": "application/x-ndjson",
                "content-encoding": "gzip",
                "x-kairos-batch-id": name,
            }
            try:
                self._ask("/telemetry/steps", body, headers)
                self.counts["pushed steps"] += len(steps)
            except urllib.error.HTTPError as problem:
                if problem.code == 429:
                    self._wait_until_s = time.monotonic() + _seconds(problem.headers.get("retry-after"))
                    return
                if problem.code not in _REFUSED:
                    raise
                self.counts["refused steps"] += len(steps)
                self._say(f"steps were refused with {problem.code}")
            self._batch = None

    # -- strategy and models

    def _pull_strategy(self) -> None:
        answer = self._get("/strategies/active")
        if answer is None:
            return
        told = msgspec.json.decode(answer, type=ActiveStrategy)
        known = self._strategy
        if known is not None and (told == known or told.generation < known.generation):
            return
        self._strategy = told  # one that is refused is not asked for again
        strategy = parse_strategy(told.text)
        for _, choice in strategy.choices():
            if ":" in choice.name:
                raise ConfigError(f"policy {choice.name} of strategy {told.name} is not installed here under a name")
        self.news.append(NewStrategy(strategy.check(), told.name))
        self.counts["pulled strategies"] += 1

    def _pull_model(self) -> None:
        answer = self._get("/models/serving")
        if answer is None:
            return
        models = msgspec.json.decode(answer, type=ServingModels).models
        told = next((m for m in models if m.profile_id == self.profile.profile_id), None)
        if told is None or told == self._model:
            return
        if told.schema_hash not in ("", SCHEMA_HASH):
            self._model = told
            raise InputError(f"model {told.version} was trained on features {told.schema_hash}, not {SCHEMA_HASH}")
        content = self._get(f"/models/{told.profile_id}/{told.version}/artifact")
        if content is None:
            return
        self._model = told
        found = parse(content, f"{told.profile_id} {told.version}").profile(self.profile)
        self.news.append(NewStepTimes(found, str(told.version)))
        self.counts["pulled models"] += 1

    # -- the wire

    def _get(self, path: str) -> bytes | None:
        """An answer; None where there is no such thing."""
        try:
            return self._ask(path)
        except urllib.error.HTTPError as problem:
            if problem.code == 404:
                return None
            raise

    def _ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {**self._headers, **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read(LARGEST_ANSWER_BYTES + 1)
        except urllib.error.HTTPError:
            self.reached_s = time.time()
            raise
        if len(content) > LARGEST_ANSWER_BYTES:
            raise InputError(f"the answer of {path} is larger than {LARGEST_ANSWER_BYTES} bytes")
        self.reached_s = time.time()
        return content

    def _failed(self, how: str, problem: Exception) -> None:
        self.counts[f"{how} exchanges"] += 1
        self._say(str(problem))

    def _say(self, what: str) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            _log.warning("control plane %s: %s; the engine goes on with what it has", self.url, what)


def row_of(step: StepRecord, profile: Profile) -> StepRow:
    """A step as it is sent."""
    return StepRow(
        gpu=profile.gpu,
        model=profile.model,
        precision=profile.precision,
        tp=profile.tp,
        ep=profile.ep,
        engine=profile.engine,
        latency_ms=step.step_s * 1e3,
        run=step.run,
        n_requests=step.n_requests,
        new_tokens=step.new_tokens,
        cached_tokens=step.cached_tokens,
        batch_size=step.batch_size,
        sum_context_tokens=step.sum_context_tokens,
        prev_phase=step.prev_phase,  # type: ignore[arg-type]  # one of PHASES
    )


def _seconds(retry_after: str | None) -> float:
    """How long to wait after a 429 (RFC 9110, Retry-After in seconds); 2 s where it does not say."""
    try:
        return min(float(retry_after or 2.0), 60.0)
    except ValueError:
        return 2.0
