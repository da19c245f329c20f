"""The thread behind a shadow: takes a sample of decisions off the path of their answers, and asks both strategies."""

import copy
import logging
import zlib
from collections.abc import Sequence
from queue import Empty, Full, Queue

import msgspec

from kairos.predictors.step_time import StepTimePredictor
from kairos.scheduler_core.domain import Line, Part, StepTimes
from kairos.scheduler_core.errors import KairosError
from kairos.scheduler_core.service.background import Background
from kairos.scheduler_core.service.experiments.keeper import Experiments
from kairos.scheduler_core.service.experiments.shadow import Sample, ShadowPlan, compared, on_time
from kairos.scheduler_core.service.schedule import Decided, Scheduler
from kairos.scheduler_core.service.schemas import Answer
from kairos.scheduler_core.service.store.queries import experiments as queries

_log = logging.getLogger(__name__)

WAITING_SAMPLES = 16
ASSUMED_ERROR = 0.2
"""How wrong step times are taken to be in one case of ten each way, where no model says it."""
_USUAL_PROMPT_TOKENS = 2_000


class Shadow:
    """Watches decisions; what it cannot keep up with is left out, and counted."""

    def __init__(self, experiments: Experiments) -> None:
        self.experiments = experiments
        self._queue: Queue[Decided] = Queue(WAITING_SAMPLES)
        self._background = Background("kairos-shadow", self._run)
        self._left_out = experiments.plane.metrics.shadow_left_out
        scheduler = experiments.plane.scheduler
        scheduler.watchers = (*scheduler.watchers, self.watch)

    def watch(self, decided: Decided) -> None:
        """Take a decision of the champion into the sample, by its id: the same one on every replica."""
        running = self.experiments.shadow
        if running is None or decided.strategy.name != running.plan.champion:
            return
        if zlib.crc32(decided.answer.decision_id.encode()) % 10_000 >= running.plan.share * 10_000:
            return
        try:
            self._queue.put_nowait(decided)
        except Full:
            self._left_out.inc()

    def start(self) -> None:
        """Begin."""
        self._background.start()

    def stop(self) -> None:
        """Return once nothing runs any more."""
        self._background.stop()

    def _run(self) -> None:
        while not self._background.stopped.is_set():
            try:
                decided = self._queue.get(timeout=0.5)
            except Empty:
                continue
            try:
                self.look(decided)
            except KairosError as error:
                self._left_out.inc()
                _log.warning("a decision was not looked at in the shadow: %s", error)
            except Exception:
                self._left_out.inc()
                _log.exception("a decision could not be looked at in the shadow")

    def look(self, decided: Decided) -> None:
        """Ask both strategies about a snapshot, and keep how they differ.

        Raises:
            KairosError: the challenger cannot be asked, or the database is away.
        """
        running = self.experiments.shadow
        if running is None:
            return
        sample = self._sample(decided, running.plan)
        i = zlib.crc32(decided.answer.decision_id.encode()) >> 1
        with self.experiments.database.store.write() as connection:
            queries.add_pair(connection, running.plan.id, "sample", i, msgspec.to_builtins(sample))

    def _sample(self, decided: Decided, plan: ShadowPlan) -> Sample:
        scheduler = self.experiments.plane.scheduler
        challenger = asked(scheduler, decided, plan.challenger, None)
        quick, slow = (
            on_time(asked(scheduler, decided, plan.challenger, upper))
            - on_time(asked(scheduler, decided, plan.champion, upper))
            for upper in (False, True)
        )
        return compared(self.experiments.clock.at(decided.at_s), decided.answer, challenger, (quick, slow))


def asked(scheduler: Scheduler, decided: Decided, strategy: str, upper: bool | None) -> Answer:
    """What a strategy decides for a snapshot, which nobody is told.

    Args:
        upper: with the P90 of step times; False: with the P10; None: as predicted.
    """
    apart = copy.copy(scheduler)
    apart.watchers = ()
    if upper is not None:
        apart.profiles = copy.copy(scheduler.profiles)
        apart.profiles.by_name = {
            name: known._replace(step_times=Scaled(known.step_times, _factor(known.step_times, upper)))
            for name, known in scheduler.profiles.by_name.items()
        }
    snapshot = msgspec.structs.replace(decided.snapshot, strategy=strategy)
    return apart.schedule(snapshot, decided.at_s, b"")


def _factor(times: StepTimes, upper: bool) -> float:
    """A quantile of the step time over its median."""
    if not isinstance(times, StepTimePredictor):
        return 1.0 + ASSUMED_ERROR if upper else 1.0 / (1.0 + ASSUMED_ERROR)
    predicted = times.predict_step(n_requests=1, new_tokens=_USUAL_PROMPT_TOKENS)
    quantile = predicted.upper_s if upper else predicted.lower_s
    return float(quantile[0] / predicted.median_s[0])


class Scaled(msgspec.Struct, frozen=True):
    """Step times, each so many times as long."""

    times: StepTimes
    factor: float

    @property
    def prefill_line(self) -> Line:
        """The prefill coefficients."""
        return Line(*(self.factor * each for each in self.times.prefill_line))

    @property
    def decode_line(self) -> Line:
        """The decode coefficients."""
        return Line(*(self.factor * each for each in self.times.decode_line))

    def prefill_step_s(self, parts: Sequence[Part], noise: Sequence[float] | None = None) -> float:
        """Seconds of one prefill step."""
        return self.factor * self.times.prefill_step_s(parts, noise)

    def remaining_prefill_s(self, new_tokens: int, context_tokens: int, chunk_tokens: int | None) -> float:
        """Seconds to compute a prompt alone."""
        return self.factor * self.times.remaining_prefill_s(new_tokens, context_tokens, chunk_tokens)

    def decode_step_s(self, batch_size: int, sum_context_tokens: int) -> float:
        """Seconds of one decode step."""
        return self.factor * self.times.decode_step_s(batch_size, sum_context_tokens)
