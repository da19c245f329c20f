"""What Kairos decides in the torch engine and reports of it: the Planner that the vLLM plugin has too."""

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kairos import __version__
from kairos.adapters.control_plane import ControlPlane, NewStepTimes, NewStrategy
from kairos.adapters.embedded.background import Background
from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.embedded.planner import Limits, Planner, Room, StepPlan
from kairos.adapters.embedded.settings import EngineSettings
from kairos.adapters.embedded.status import Durations, EngineStatus, as_counts, number
from kairos.scheduler_core.domain import Part, Profile, RequestId
from kairos.scheduler_core.policy import DecodeStep
from kairos.scheduler_core.strategy import Strategy, parse_strategy
from kairos.scheduler_core.telemetry import StepRecord

LONGEST_PAUSE_S = 1.0
"""A longer one between two steps was idle time."""

LOG_EVERY_S = 60.0

_log = logging.getLogger(__name__)


class Held(NamedTuple):
    """What a step held, and what came of it."""

    prompts: Sequence[tuple[Entry, Part]]
    done: Sequence[RequestId]
    """Whose prompt it completed."""
    decodes: Sequence[int]
    """Context tokens of each request in decode, before the step."""
    finished_output_tokens: Sequence[int]
    """Of the requests that ended with it."""
    began_s: float
    """On the monotonic clock."""
    seconds: float


class Policies:
    """The plan, the view and the reports of one engine.

    Args:
        place: puts an entry back into a fresh view, as the engine knows it.
        on_step: told every step.

    Raises:
        InputError: a setting that does not fit.
    """

    def __init__(
        self,
        settings: EngineSettings,
        api_key: str,
        profile: Profile,
        limits: Limits,
        engine_version: str,
        place: Callable[[Entry, float], None],
        on_step: Callable[[StepRecord], None] | None,
    ) -> None:
        self.settings = settings
        self.profile = profile
        self.entries: dict[RequestId, Entry] = {}
        self.planner = Planner(
            parse_strategy(settings.strategy),
            settings.step_times(profile),
            limits,
            deferred_share=settings.deferred_share,
            budget_s=settings.decision_budget_s,
            longest_hold_s=settings.longest_hold_s,
        )
        self.run = uuid.uuid4().hex[:12]
        self.control_plane = (
            ControlPlane(settings.control_plane, profile, self.run, api_key) if settings.control_plane else None
        )
        self._place, self._on_step, self._engine_version = place, on_step, engine_version
        self._strategy_name = settings.strategy
        self._step_times_from = "settings" if settings.linear or settings.model else "bandwidth, FLOPs and model size"
        self._overhead, self._steps = Durations(), Durations()
        self._started_at = time.time()
        self._ended_s = 0.0
        self._phase = ""
        self._logged_s = float("-inf")
        self._background: Background | None = None

    def start(self) -> None:
        """Begin to write the status and to speak with the control plane."""
        self._background = Background(self._status, self.settings.status_folder(), self.control_plane)

    def close(self) -> None:
        """Say and send what is left."""
        if self._background is not None:
            self._background.close()

    # -- requests

    def entry(self, request_id: RequestId, prompt_tokens: int, told: Mapping[str, Any], remote: bool = False) -> Entry:
        """A request as policies see it, from the fields of its body that vLLM's plugin reads too."""
        extra = told.get("vllm_xargs")
        extra = extra if isinstance(extra, dict) else {}
        slo_class = str(extra.get("kairos_class", "default"))
        targets = self.settings.targets_of(slo_class, extra)
        return Entry(request_id, None, time.monotonic(), prompt_tokens, targets, slo_class, remote)

    def arrived(self, entry: Entry) -> None:
        """It waits from now on."""
        self.entries[entry.request_id] = entry
        self.planner.mirror.arrive(entry, time.monotonic())

    def left(self, entry: Entry) -> None:
        """It ended or was given up."""
        if self.entries.pop(entry.request_id, None) is not None:
            self.planner.mirror.leave(entry)

    # -- steps

    def plan(self, room: Room) -> StepPlan:
        """The next step; first come, first served where Kairos has none."""
        started_s = time.perf_counter()
        now_s = time.monotonic()
        plan = None
        try:
            self._take_news(now_s)
            plan = self.planner.plan(self.entries, room, now_s)
        except Exception as problem:  # a plugin's, or a decision that was stopped: first come, first served
            self._failed(problem, now_s)
        self._overhead.add(time.perf_counter() - started_s)
        return plan or StepPlan((), False, (), (), self.planner.limits.step_tokens)

    def _failed(self, problem: Exception, now_s: float) -> None:
        """Count it, say it once a minute, and make the view anew."""
        self.planner.counts[f"failed {type(problem).__name__}"] += 1
        self._use(self.planner.decider.strategy, now_s)
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            _log.warning("kairos: first come, first served for this step", exc_info=problem)

    def began(self, parts: Sequence[tuple[Entry, Part]], scheduled: Sequence[RequestId], tokens_left: bool) -> None:
        """Take in what the engine made of the plan."""
        now_s = time.monotonic()
        self.planner.filled(scheduled, tokens_left)
        self.planner.started(parts)
        for entry, (new_tokens, context_tokens) in parts:
            if new_tokens + context_tokens < entry.prompt_tokens:
                self.planner.mirror.computed(entry, new_tokens + context_tokens, now_s)
            else:
                self.planner.mirror.prompt_done(entry)

    def ended(self, held: Held) -> None:
        """Take in a step that ended, and report it."""
        parts = [part for _, part in held.prompts]
        new_tokens, batch = sum(part.new_tokens for part in parts), len(held.decodes)
        idle = self._ended_s and held.began_s - self._ended_s > LONGEST_PAUSE_S
        record = StepRecord(
            kind="decode" if not parts else "mixed" if batch else "prefill",
            step_s=held.seconds,
            n_requests=len(parts),
            new_tokens=new_tokens,
            cached_tokens=sum(part.context_tokens for part in parts),
            batch_size=batch,
            sum_context_tokens=sum(held.decodes),
            prev_phase="idle" if idle else self._phase,
            run=self.run,
        )
        self._ended_s = held.began_s + held.seconds
        self._phase = "context" if record.kind == "prefill" else record.kind
        self._steps.add(held.seconds)
        decode = None
        if batch:
            decode = DecodeStep(
                held.seconds, batch, record.sum_context_tokens, max(held.decodes), held.finished_output_tokens
            )
        self.planner.ended(held.seconds, new_tokens, held.done, decode)
        if self.control_plane is not None:
            self.control_plane.note(record)
        if self._on_step is not None:
            self._on_step(record)

    # -- strategy and models

    def _take_news(self, now_s: float) -> None:
        if self.control_plane is None or not self.control_plane.news:
            return
        news = self.control_plane.news.popleft()
        if isinstance(news, NewStrategy):
            self._use(news.strategy, now_s)
            self._strategy_name = f"{news.name} ({news.strategy.text})"
        elif isinstance(news, NewStepTimes):
            self.planner.use_step_times(news.step_times, now_s)
            self._step_times_from = f"control plane, model {news.version}"

    def _use(self, strategy: Strategy, now_s: float) -> None:
        self.planner.mirror = self.planner.fresh(strategy)
        for entry in self.entries.values():
            self._place(entry, now_s)

    # -- for people

    def _status(self) -> EngineStatus:
        step_p50_s, _ = self._steps.percentiles()
        overhead_p50_s, overhead_p99_s = self._overhead.percentiles()
        plane, rule = self.control_plane, self.planner.mirror.lane.rule
        decides = ["order of waiting prompts", "who takes part in a decode step", "admission to decode"]
        decides += ["prompt tokens beside decodes"]
        decides += ["running prompts yield at chunk ends"] * rule.preempt + ["which prompts share a step"] * rule.packs
        return EngineStatus(
            kairos=__version__,
            engine="torch",
            engine_version=self._engine_version,
            tested=True,
            pid=os.getpid(),
            run=self.run,
            written_s=time.time(),
            started_s=self._started_at,
            profile_id=self.profile.profile_id,
            strategy=self._strategy_name,
            step_times=self._step_times_from,
            decides=decides,
            stops_stalls=self.planner.limit.active,
            steps=self._steps.count,
            step_p50_s=number(step_p50_s),
            overhead_p50_s=number(overhead_p50_s),
            overhead_p99_s=number(overhead_p99_s),
            counts=as_counts(self.planner.counts),
            fallbacks=as_counts(self.planner.decider.validity.fallbacks),
            control_plane=plane.url if plane else None,
            reached_s=plane.reached_s if plane else None,
            exchanged=as_counts(plane.counts) if plane else {},
        )
