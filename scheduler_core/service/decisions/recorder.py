"""Keeps decisions beside the answers: what was decided is handed over, a thread chooses what is worth a row.

A request waits through many snapshots: kept are its first one, those in which the prediction turns (late, or on time
again) or something new speaks for keeping it, and the one that starts it; at most `_MOST_ROWS`.
"""

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from hashlib import blake2b
from threading import Lock

from kairos.scheduler_core.config import DecisionSettings
from kairos.scheduler_core.decision import Reason
from kairos.scheduler_core.domain import RequestId
from kairos.scheduler_core.errors import BusyError, StoreError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.decisions.scene import Scene
from kairos.scheduler_core.service.metrics import Metrics
from kairos.scheduler_core.service.plane import Database
from kairos.scheduler_core.service.profiles import Profiles
from kairos.scheduler_core.service.schedule import Decided
from kairos.scheduler_core.service.schemas import DecodeCode, PrefillAnswer
from kairos.scheduler_core.service.store.queries.decisions import (
    KEPT_FOR,
    DecisionRow,
    DecisionRows,
    KeptFor,
)

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
"""How long a decision may lie before it is looked at."""
FORGET_AFTER_S = 600.0
"""A request that is seen again after so long is new."""
_MOST_ROWS = 8
_MOST_AT_ONCE = 1_000
"""Requests of one snapshot that are looked at closely."""
_MOST_KNOWN = 200_000
"""Requests remembered at once."""
_MOST_WAITING_REQUESTS = 200_000
"""Of decisions that were not looked at yet."""


def in_sample(request_id: str, share: float) -> bool:
    """Whether a request is recorded whatever happens to it: the same at every replica.

    >>> in_sample("r-1", 1.0), in_sample("r-1", 0.0)
    (True, False)
    """
    return int.from_bytes(blake2b(request_id.encode(), digest_size=7).digest()) < share * 2**56


class Trail:
    """What was kept of one request so far."""

    __slots__ = ("began_s", "on_time", "reasons", "rows", "started")

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.on_time: bool | None = None
        self.started = False
        self.rows = 0
        self.reasons: set[KeptFor] = set()


class Recorder:
    """Takes what was decided, without keeping the answer waiting, and stores what is worth it.

    Args:
        profiles: where step times come from now.
    """

    def __init__(
        self, database: Database, settings: DecisionSettings, profiles: Callable[[], Profiles], metrics: Metrics
    ) -> None:
        self._database, self._settings, self._profiles, self._metrics = database, settings, profiles, metrics
        self._lock = Lock()
        self._decided: deque[Decided] = deque()
        self._waiting_requests = 0
        self._rows: deque[DecisionRow] = deque()
        self._sent: tuple[Future[int], list[DecisionRow]] | None = None
        self._trails: dict[RequestId, Trail] = {}
        self._quiet: tuple[set[RequestId], set[RequestId]] = (set(), set())
        """Ids of which nothing new is to be told while they are predicted late, and while on time."""
        self._started: set[RequestId] = set()
        self._long_waits: list[tuple[float, str, RequestId]] = []
        self._background = Background("kairos-decisions", self._run)

    # -- in

    def watch(self, decided: Decided) -> None:
        """Take a decision over if it has news; counted as dropped where too many were not looked at yet.

        A snapshot without news is not held on to: memory that is used again at once costs less than a look at it.
        """
        if not self._has_news(decided):
            return
        requests = len(decided.answer.prefill) + 1
        with self._lock:
            if self._waiting_requests + requests > _MOST_WAITING_REQUESTS and self._decided:
                self._metrics.decisions_dropped.inc(requests - 1)
                return
            self._waiting_requests += requests
            self._decided.append(decided)

    def keep(self, row: DecisionRow) -> None:
        """Have a row stored that was made elsewhere; the oldest one goes, counted, where too many wait."""
        with self._lock:
            if len(self._rows) >= self._settings.queued_rows:
                self._rows.popleft()
                self._metrics.decisions_dropped.inc()
            self._rows.append(row)

    def keep_of(
        self,
        request_id: str,
        tenant: str,
        decision_id: str,
        at_s: float,
        why: KeptFor | None,
        body: Callable[[], bytes],
    ) -> None:
        """Have a decision stored that was made about one request, if something speaks for it or it is in the sample."""
        if why is not None or in_sample(request_id, self._settings.sample_share):
            at = datetime.fromtimestamp(at_s, UTC)
            self.keep(DecisionRow(at, request_id, tenant or None, decision_id, why or "sampled", body()))

    def start(self) -> None:
        """Begin to look."""
        self._background.start()

    def stop(self) -> None:
        """Look at what is left, and store it if the database answers."""
        self._background.stop()
        self._turn()
        self._database.writer.drain()
        self._settled()
        self._metrics.decisions_dropped.inc(len(self._rows))

    # -- the thread

    def _run(self) -> None:
        while not self._background.stopped.wait(LOOK_EVERY_S):
            self._turn()

    def _turn(self) -> None:
        try:
            while self._decided:
                with self._lock:
                    decided = self._decided.popleft()
                    self._waiting_requests -= len(decided.answer.prefill) + 1
                self.look(decided)
            self._forget()
            self._send()
        except Exception:  # the thread's top: what was being looked at is lost, the next is not
            self._metrics.decisions_dropped.inc()
            _log.exception("decisions were not recorded")

    def look(self, decided: Decided) -> None:
        """Keep of a decision what is new and worth a row; what is too much for one look, the next one sees."""
        answer = decided.answer
        news = self._news(decided)
        scene = Scene(decided, self._profiles())
        for entry in news[:_MOST_AT_ONCE]:
            self._look_at(entry, scene)
        for rejection in answer.rejected:
            trail = self._trail(rejection.request_id)
            if trail.rows < _MOST_ROWS:
                self._add(scene.rejected(rejection), trail)
        for placement in answer.placements:
            trail = self._trail(placement.request_id)
            if decided.failures:
                trail.reasons.add("failed")
            if trail.reasons and trail.rows < _MOST_ROWS:
                self._add(scene.placed(placement, _best(trail.reasons)), trail)
        for step in answer.decode:
            if step.reason.code is DecodeCode.FALLBACK:
                for request_id in step.admit:
                    trail = self._trail(request_id)
                    if trail.rows < _MOST_ROWS:
                        self._add(scene.admitted(request_id, step), trail)

    def _has_news(self, decided: Decided) -> bool:
        return bool(self._news(decided) or decided.answer.rejected or decided.answer.placements)

    def _news(self, decided: Decided) -> Sequence[PrefillAnswer]:
        """Of whom there may be something new to tell: whoever starts, is new here, or is predicted otherwise."""
        entries, quiet, started = decided.answer.prefill, self._quiet, self._started
        if decided.failures:
            return entries
        return [
            e
            for e in entries
            if e.request_id not in quiet[e.on_time]
            or (e.step_tokens and (e.request_id not in started or e.reason.chosen_by is Reason.SHARE_GUARD))
        ]

    def _look_at(self, entry: PrefillAnswer, scene: Scene) -> None:
        trail = self._trail(entry.request_id)
        reasons = set(_reasons(entry, bool(scene.decided.failures), self._settings.long_wait_s))
        new = trail.on_time is None or not trail.reasons.issuperset(reasons)
        turned = trail.on_time is not entry.on_time
        starts = entry.step_tokens > 0 and not trail.started
        if trail.on_time is None and (left_s := self._settings.long_wait_s - entry.reason.waited_s) > 0:
            due_s = time.monotonic() + left_s
            heapq.heappush(self._long_waits, (due_s, str(entry.request_id), entry.request_id))
        trail.reasons |= reasons
        trail.on_time = entry.on_time
        if starts:
            trail.started = True
            self._started.add(entry.request_id)
        self._quiet[entry.on_time].add(entry.request_id)
        self._quiet[not entry.on_time].discard(entry.request_id)
        if trail.reasons and (starts or ((new or turned) and trail.rows < _MOST_ROWS)):
            self._add(scene.prefill(entry, _best(reasons or trail.reasons)), trail)

    def _trail(self, request_id: RequestId) -> Trail:
        trail = self._trails.get(request_id)
        if trail is None:
            trail = self._trails[request_id] = Trail(time.monotonic())
            if in_sample(str(request_id), self._settings.sample_share):
                trail.reasons.add("sampled")
        return trail

    def _add(self, row: DecisionRow, trail: Trail) -> None:
        trail.rows += 1
        trail.reasons.add(row.kept_for)
        self.keep(row)

    def _forget(self) -> None:
        now_s = time.monotonic()
        while self._long_waits and self._long_waits[0][0] <= now_s:
            _, _, request_id = heapq.heappop(self._long_waits)
            for quiet in self._quiet:
                quiet.discard(request_id)
        while self._trails:
            oldest = next(iter(self._trails))
            if len(self._trails) <= _MOST_KNOWN and now_s - self._trails[oldest].began_s < FORGET_AFTER_S:
                break
            del self._trails[oldest]
            self._started.discard(oldest)
            for quiet in self._quiet:
                quiet.discard(oldest)

    # -- out

    def _send(self) -> None:
        """Hand rows to the writer, one batch at a time."""
        if not self._settled():
            return
        with self._lock:
            rows = list(self._rows)
            self._rows.clear()
        if rows:
            try:
                self._sent = self._database.writer.put(DecisionRows(rows)), rows
            except BusyError:
                self._put_back(rows)

    def _settled(self) -> bool:
        """Whether no batch is on its way; rows that could not be stored for now go back."""
        if self._sent is None:
            return True
        future, rows = self._sent
        if not future.done():
            return False
        self._sent = None
        error = future.exception()
        if error is None:
            for row in rows:
                self._metrics.decisions.labels(row.kept_for).inc()
        elif isinstance(error, StoreError):
            self._put_back(rows)
        else:
            self._metrics.decisions_dropped.inc(len(rows))
        return True

    def _put_back(self, rows: Sequence[DecisionRow]) -> None:
        """Let rows wait again, before the newer ones; the oldest go, counted, where too many wait."""
        with self._lock:
            self._rows.extendleft(reversed(rows))
            excess = max(0, len(self._rows) - self._settings.queued_rows)
            for _ in range(excess):
                self._rows.popleft()
        self._metrics.decisions_dropped.inc(excess)


def _best(reasons: Collection[KeptFor]) -> KeptFor:
    return min(reasons, key=KEPT_FOR.index)


def _reasons(entry: PrefillAnswer, failed: bool, long_wait_s: float) -> Iterator[KeptFor]:
    chosen_by = entry.reason.chosen_by
    if failed or chosen_by is Reason.FALLBACK:
        yield "failed"
    if chosen_by is Reason.SHARE_GUARD:
        yield "guarded"
    if not entry.on_time:
        yield "missed"
    if entry.reason.waited_s >= long_wait_s:
        yield "long_wait"
