"""The data plane's side of the control plane: telemetry goes there in batches, strategy and models come from there.

`exchange` is called again and again from a thread of its own; the thread that serves only appends to a bounded queue
and looks whether there is news. With the control plane away the data plane goes on with what it has: rows are kept up
to a limit, the oldest are dropped and counted.
"""

import gzip
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from kairos.predictors.artifact import parse
from kairos.predictors.features import SCHEMA_HASH
from kairos.scheduler_core.domain import Profile, StepTimes
from kairos.scheduler_core.errors import ConfigError, InputError, KairosError
from kairos.scheduler_core.strategy import Strategy, parse_strategy
from kairos.scheduler_core.telemetry import RequestRow, StepRecord, StepRow

TIMEOUT_S = 2.0
KEPT_STEPS = 100_000
"""About half an hour of steps of 20 ms."""
KEPT_DOCUMENTS = 1_000
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
    known_as: str = ""
    """`name@version`: what telemetry reports."""


class NewStepTimes(NamedTuple):
    """A model that the control plane serves for this profile."""

    step_times: StepTimes
    version: str
    profile_id: str = ""


Row = TypeVar("Row")


class Outbox(Generic[Row]):
    """Rows that wait to be sent, and the batch that is being sent.

    Args:
        path: where they go.
        what: what they are called in counts.
        encode: a row as a line of JSON.
        prefix: of the batches' numbers, which no two kinds of rows may share.
    """

    def __init__(self, path: str, what: str, encode: Callable[[Row], bytes], prefix: str = "") -> None:
        self.path, self.what, self.encode, self.prefix = path, what, encode, prefix
        self.rows: deque[Row] = deque()
        self.batch: tuple[str, Sequence[Row]] | None = None
        self.batches = 0

    def next_batch(self, run: str) -> tuple[str, Sequence[Row]] | None:
        """The batch that was not taken yet, or a new one; None when there is nothing to send."""
        if self.batch is None and self.rows:
            rows = [self.rows.popleft() for _ in range(min(BATCH_ROWS, len(self.rows)))]
            self.batches += 1
            self.batch = f"{run}/{self.prefix}{self.batches}", rows
        return self.batch


class ControlPlane:
    """Speaks with one control plane for one engine, or for a gateway in front of several.

    Args:
        url: its address.
        profile: of the engine: its steps are sent, its model is pulled.
        run: names this run of the engine; batches are numbered within it, so that a batch sent twice is stored once.
        api_key: sent as a bearer token when given.
        others: profiles whose models are pulled too.
        hear: told every answer of `GET /strategies/active`, by who takes part in experiments; strategies are no news
            then.
    """

    def __init__(
        self,
        url: str,
        profile: Profile,
        run: str,
        api_key: str = "",
        others: Sequence[Profile] = (),
        hear: Callable[[bytes], None] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the control plane's address is {url}; write http://HOST:PORT")
        self.url = url.rstrip("/")
        self.profile = profile
        self._profiles = (profile, *others)
        self._hear = hear
        self.run = run
        self.news: deque[NewStrategy | NewStepTimes] = deque()
        """What the engine's thread has not taken up yet."""
        self.counts: Counter[str] = Counter()
        """Rows pushed, dropped, refused; requests that failed; what was pulled or refused."""
        self.reached_s: float | None = None
        """When it answered last, UTC epoch."""
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._steps = Outbox[StepRecord]("/telemetry/steps", "steps", self._encode_step)
        self._requests = Outbox[RequestRow]("/telemetry/requests", "requests", _encoder.encode, "requests/")
        self._documents: dict[str, tuple[str, bytes]] = {}
        self._wait_until_s = 0.0
        self._strategy: ActiveStrategy | None = None
        self._models: dict[str, ServingModel] = {}
        self._logged_s = float("-inf")

    def note(self, step: StepRecord) -> None:
        """Keep a step for the next batch; called by the engine's thread."""
        self._keep(self._steps, step)

    def note_request(self, row: RequestRow) -> None:
        """Keep a request that has ended for the next batch; called by the gateway's thread."""
        self._keep(self._requests, row)

    def note_document(self, name: str, path: str, body: bytes) -> None:
        """Keep a document that is put at a path; a newer one of the same name takes its place."""
        if len(self._documents) >= KEPT_DOCUMENTS and name not in self._documents:
            del self._documents[next(iter(self._documents))]
            self.counts["dropped documents"] += 1
        self._documents[name] = path, body

    def _keep(self, outbox: Outbox[Row], row: Row) -> None:
        if len(outbox.rows) >= KEPT_STEPS:
            outbox.rows.popleft()
            self.counts[f"dropped {outbox.what}"] += 1
        outbox.rows.append(row)

    def exchange(self) -> None:
        """Push what is there, pull what is new. Whatever fails is counted, said once a minute, and tried again."""
        parts = (self._pull_strategy, self._pull_models, self._push_steps, self._push_requests, self._push_documents)
        for part in parts:
            try:
                part()
            except KairosError as problem:
                self._failed("refused", problem)
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as problem:
                self._failed("failed", problem)
                return  # it is away: no use in asking for more now

    # -- telemetry

    def _push_steps(self) -> None:
        self._push(self._steps)

    def _push_requests(self) -> None:
        self._push(self._requests)

    def _push(self, outbox: Outbox[Row]) -> None:
        if time.monotonic() < self._wait_until_s:
            return
        while (batch := outbox.next_batch(self.run)) is not None:
            name, rows = batch
            body = gzip.compress(b"\n".join(map(outbox.encode, rows)), 1)
            headers = {
                "content-type": "application/x-ndjson",
                "content-encoding": "gzip",
                "x-kairos-batch-id": name,
            }
            try:
                self._ask(outbox.path, body, headers)
                self.counts[f"pushed {outbox.what}"] += len(rows)
            except urllib.error.HTTPError as problem:
                if problem.code == 429:
                    self._wait_until_s = time.monotonic() + _seconds(problem.headers.get("retry-after"))
                    return
                if problem.code not in _REFUSED:
                    raise
                self.counts[f"refused {outbox.what}"] += len(rows)
                self._say(f"{outbox.what} were refused with {problem.code}")
            outbox.batch = None

    def _push_documents(self) -> None:
        for name in list(self._documents):
            path, body = told = self._documents.pop(name)
            try:
                self._ask(path, body, {"content-type": "application/json"}, "PUT")
                self.counts["pushed documents"] += 1
            except (OSError, http.client.HTTPException) as problem:
                if isinstance(problem, urllib.error.HTTPError) and problem.code in _REFUSED:
                    self.counts["refused documents"] += 1
                    self._say(f"{path} was refused with {problem.code}")
                    continue
                self._documents.setdefault(name, told)
                raise

    def _encode_step(self, step: StepRecord) -> bytes:
        return _encoder.encode(row_of(step, self.profile))

    # -- strategy and models

    def _pull_strategy(self) -> None:
        answer = self._get("/strategies/active")
        if answer is None:
            return
        if self._hear is not None:
            self._hear(answer)
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
        self.news.append(NewStrategy(strategy.check(), told.name, f"{told.name}@{told.version}"))
        self.counts["pulled strategies"] += 1

    def _pull_models(self) -> None:
        answer = self._get("/models/serving")
        if answer is None:
            return
        served = {model.profile_id: model for model in msgspec.json.decode(answer, type=ServingModels).models}
        for profile in self._profiles:
            told = served.get(profile.profile_id)
            if told is not None and told != self._models.get(profile.profile_id):
                self._pull_model(profile, told)

    def _pull_model(self, profile: Profile, told: ServingModel) -> None:
        if told.schema_hash not in ("", SCHEMA_HASH):
            self._models[profile.profile_id] = told
            raise InputError(f"model {told.version} was trained on features {told.schema_hash}, not {SCHEMA_HASH}")
        content = self._get(f"/models/{told.profile_id}/{told.version}/artifact")
        if content is None:
            return
        self._models[profile.profile_id] = told
        found = parse(content, f"{told.profile_id} {told.version}").profile(profile)
        self.news.append(NewStepTimes(found, str(told.version), profile.profile_id))
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

    def _ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> bytes:
        request = urllib.request.Request(self.url + path, body, {**self._headers, **(headers or {})}, method=method)
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
            _log.warning("control plane %s: %s; what serves goes on with what it has", self.url, what)


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
