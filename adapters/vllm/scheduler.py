"""What Kairos does in vLLM's scheduler: it plans a step, lets vLLM carry it out, and keeps its view.

vLLM decides about memory, tokens and connectors as ever. Before its `schedule` runs, the plan sets what vLLM looks at:
the order of the waiting queue, the step from which a running request may be scheduled again, the order of the running
list, and the token budget. Whatever fails in Kairos leaves vLLM as it would be without it, for that step.

`--scheduler-cls` is not a public interface of vLLM: what is used of it is looked for at start, and a version without it
is refused.
"""

import logging
import os
import time
import uuid
from collections.abc import Iterable
from importlib.metadata import version as installed_version
from itertools import chain
from typing import Any

from kairos import __version__
from kairos.adapters.control_plane import ControlPlane, NewStepTimes, NewStrategy
from kairos.adapters.embedded.background import Background
from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.embedded.planner import Limits, Planner, Room, StepPlan
from kairos.adapters.embedded.settings import API_KEY, EngineSettings, load_settings
from kairos.adapters.embedded.status import Durations, EngineStatus, as_counts, number
from kairos.adapters.vllm.forward_pass import Publisher, queued_of, scheduled_of
from kairos.adapters.vllm.queue import KairosQueue
from kairos.adapters.vllm.report import StepShape, decode_step_of, record_of, shape_of
from kairos.scheduler_core.domain import Profile
from kairos.scheduler_core.errors import ConfigError
from kairos.scheduler_core.strategy import Strategy, parse_strategy

TESTED = ("0.28.0", "0.32.0", "0.33.0")
NEEDED = (
    *("waiting", "running", "requests", "current_step", "max_num_scheduled_tokens", "max_num_running_reqs"),
    *("kv_cache_manager", "scheduler_config", "vllm_config"),
)
"""What of vLLM's scheduler is used and cannot be done without."""
LEAST_PROMPT_TOKENS = 16
LONGEST_PAUSE_S = 1.0
"""A longer one between two steps was idle time."""
LOG_EVERY_S = 60.0

_log = logging.getLogger(__name__)


class KairosScheduling:
    """The part of the scheduler class that is ours; the other base is vLLM's `AsyncScheduler`.

    Raises:
        InputError: a setting that does not fit, or a vLLM that the plugin cannot work in.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kairos = Kairos(self, load_settings())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: planned by Kairos, filled by vLLM."""
        self.kairos.before_step()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.kairos.after_schedule(output)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The end of a step."""
        ended_s = time.monotonic()
        answer = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self.kairos.after_step(scheduler_output, ended_s)
        return answer

    def add_request(self, request: Any) -> None:
        """A request arrives."""
        super().add_request(request)  # type: ignore[misc]
        self.kairos.arrived(request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Requests end from outside; vLLM may say so twice."""
        finished = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        self.kairos.ended_outside()
        return finished

    def shutdown(self) -> None:
        """The engine stops."""
        self.kairos.close()
        super().shutdown()  # type: ignore[misc]


class Kairos:
    """The plan, the view and the reports of one vLLM scheduler."""

    def __init__(self, engine: Any, settings: EngineSettings) -> None:
        check_engine(engine)
        self.engine = engine
        self.settings = settings
        self.profile = settings.profile(profile_of(engine.vllm_config))
        self.entries: dict[Any, Entry] = {}
        self.full_tokens: int = engine.max_num_scheduled_tokens
        self.planner = Planner(
            parse_strategy(settings.strategy),
            settings.step_times(self.profile),
            limits_of(engine),
            deferred_share=settings.deferred_share,
            budget_s=settings.decision_budget_s,
            longest_hold_s=settings.longest_hold_s,
        )
        self.strategy_name = settings.strategy
        self.step_times_from = "settings" if settings.linear or settings.model else "bandwidth, FLOPs and model size"
        self.queue = KairosQueue(self._preempted)
        engine.waiting = self.queue
        self.run = uuid.uuid4().hex[:12]
        self.control_plane = (
            ControlPlane(settings.control_plane, self.profile, self.run, os.environ.get(API_KEY, ""))
            if settings.control_plane
            else None
        )
        parallel = engine.vllm_config.parallel_config
        rank = getattr(parallel, "data_parallel_index", 0) or 0
        self.forward_passes = Publisher.from_environment(rank, self.planner.counts)
        self.overhead, self.steps = Durations(), Durations()
        self.started_at = time.time()
        self._shapes: dict[int, tuple[Any, StepShape]] = {}
        self._spent_s = 0.0
        """In hooks since the last step was scheduled."""
        self._ended_s = 0.0
        self._phase = ""
        self._stale = False
        """Whether the view no longer tells what the engine holds, and is made anew before the next step."""
        self._logged_s = float("-inf")
        self.background = Background(self.status, settings.status_folder(), self.control_plane)

    # -- hooks; none of them raises

    def before_step(self) -> None:
        """Plan the next step, or leave it to vLLM."""
        started_s = time.perf_counter()
        engine = self.engine
        self.queue.open()
        engine.max_num_scheduled_tokens = self.full_tokens
        try:
            now_s = time.monotonic()
            self._take_news(now_s)
            if self._stale:
                self._rebuild(now_s)
            if self.entries:
                plan = self.planner.plan(self.entries, self._room(), now_s)
                if plan is not None:
                    self._apply(plan)
        except Exception as problem:  # whatever it was: first come, first served
            self._failed(problem)
            self.queue.open()
            engine.max_num_scheduled_tokens = self.full_tokens
        self._spent_s += time.perf_counter() - started_s

    def after_schedule(self, output: Any) -> None:
        """Take in what vLLM made of the plan."""
        started_s = time.perf_counter()
        try:
            now_s = time.monotonic()
            if output.total_num_scheduled_tokens:
                shape = shape_of(self.entries, output.num_scheduled_tokens, now_s)
                self._shapes[id(output)] = output, shape
                self._note_prompts(shape, now_s)
            tokens_left = output.total_num_scheduled_tokens < self.engine.max_num_scheduled_tokens
            self.planner.filled(output.num_scheduled_tokens, tokens_left)
            ready = self.planner.mirror.ready
            for request_id in [i for i in ready if i not in self.queue]:
                del ready[request_id]  # its KV is on its way, or here
        except Exception as problem:  # the view is lost, the step is not
            self._failed(problem)
        self.overhead.add(self._spent_s + time.perf_counter() - started_s)
        self._spent_s = 0.0

    def after_step(self, output: Any, ended_s: float) -> None:
        """Take in what the step produced, and report it."""
        started_s = time.perf_counter()
        try:
            kept = self._shapes.pop(id(output), None)
            if kept is not None:
                self._report(kept[1], ended_s)
        except Exception as problem:  # as above
            self._failed(problem)
        self._spent_s += time.perf_counter() - started_s

    def arrived(self, request: Any) -> None:
        """A request was added."""
        started_s = time.perf_counter()
        try:
            new = request.request_id not in self.entries  # otherwise the next input of a session
            if new and self.engine.requests.get(request.request_id) is request:
                self._enter(request, time.monotonic())
        except Exception as problem:  # as above
            self._failed(problem)
        self._spent_s += time.perf_counter() - started_s

    def ended_outside(self) -> None:
        """Requests were aborted, or failed: those that have ended leave the view."""
        started_s = time.perf_counter()
        try:
            for entry in [e for e in self.entries.values() if e.request.is_finished()]:
                self._leave(entry)
        except Exception as problem:  # as above
            self._failed(problem)
        self._spent_s += time.perf_counter() - started_s

    def close(self) -> None:
        """Stop the threads and send what is left."""
        self.background.close()
        if self.forward_passes is not None:
            self.forward_passes.close()

    # -- the plan

    def _room(self) -> Room:
        engine = self.engine
        slots = getattr(engine, "max_num_active_reqs", engine.max_num_running_reqs)
        taken = len(engine.running) + getattr(engine, "num_waiting_for_streaming_input", 0)
        free = engine.kv_cache_manager.block_pool.get_num_free_blocks() * engine.block_size
        decodes = len(engine.running) - len(self.planner.mirror.begun)
        return Room(max(0, slots - taken), free, decodes * (1 + engine.num_spec_tokens))

    def _apply(self, plan: StepPlan) -> None:
        engine = self.engine
        self.queue.plan(plan.enter, plan.closed)
        engine.max_num_scheduled_tokens = plan.tokens
        resumes_at = engine.current_step + 2  # vLLM counts up by one before it looks
        for entry in plan.held:
            request = entry.request
            request.next_decode_eligible_step = max(request.next_decode_eligible_step, resumes_at)
        begun = self.planner.mirror.begun
        if begun:
            # decodes first, then prompts that resume, then prompts in their order; who is last loses its KV first
            place = {request_id: n for n, request_id in enumerate(plan.prompts, start=2)}
            last = len(place) + 2
            engine.running.sort(
                key=lambda r: place.get(r.request_id, last) if r.request_id in begun else int(r.is_prefill_chunk)
            )

    # -- the view

    def _enter(self, request: Any, now_s: float) -> None:
        extra = (request.sampling_params.extra_args or {}) if request.sampling_params is not None else {}
        slo_class = str(extra.get("kairos_class", "default"))
        transfer = request.kv_transfer_params
        entry = Entry(
            request.request_id,
            request,
            now_s - max(0.0, time.time() - request.arrival_time),
            request.num_prompt_tokens,
            self.settings.targets_of(slo_class, extra),
            slo_class,
            bool(isinstance(transfer, dict) and transfer.get("do_remote_prefill")),
        )
        self.entries[request.request_id] = entry
        self.planner.mirror.arrive(entry, now_s)

    def _preempted(self, request: Any) -> None:
        """It lost its KV; until it has computed it again it is vLLM's affair."""
        entry = self.entries.get(request.request_id)
        if entry is not None:
            self.planner.mirror.leave(entry)
            self.planner.counts["preemptions"] += 1

    def _note_prompts(self, shape: StepShape, now_s: float) -> None:
        mirror = self.planner.mirror
        self.planner.started(shape.prompts)
        done = set(shape.done)
        for entry, part in shape.prompts:
            if entry.request_id in done:
                mirror.prompt_done(entry)
            elif not entry.output_tokens:
                mirror.computed(entry, part.context_tokens + part.new_tokens, now_s)

    def _report(self, shape: StepShape, ended_s: float) -> None:
        """One step as vLLM ran it: from its schedule, or from the end of the step before where those overlap."""
        seconds = ended_s - max(self._ended_s, shape.scheduled_s)
        phase = "idle" if self._ended_s and shape.scheduled_s - self._ended_s > LONGEST_PAUSE_S else self._phase
        self._ended_s, self._phase = ended_s, shape.phase
        self.steps.add(seconds)
        now_s = time.monotonic()
        finished = []
        mirror = self.planner.mirror
        completed = [entry for entry, _ in shape.prompts if entry.request_id in shape.done]
        for entry in (*completed, *shape.decodes):
            if self.entries.get(entry.request_id) is not entry:
                continue  # aborted while the step ran
            request = entry.request
            tokens = request.num_output_tokens
            if request.is_finished():
                finished.append(tokens)
                self._leave(entry)
            elif tokens > entry.output_tokens:
                mirror.emitted(entry, tokens, request.num_tokens, now_s)
        decode = decode_step_of(shape, seconds, finished) if shape.decodes else None
        self.planner.ended(seconds, shape.new_tokens, shape.done, decode)
        if self.control_plane is not None:
            self.control_plane.note(record_of(shape, seconds, phase, self.run))
        if self.forward_passes is not None:
            holding: Iterable[Any] = getattr(self.engine, "kv_holding_waiting", ())  # up to 0.30: skipped_waiting
            holding = holding or getattr(self.engine, "skipped_waiting", ())
            self.forward_passes.send(seconds, scheduled_of(shape), queued_of(chain(self.queue, holding)))

    def _leave(self, entry: Entry) -> None:
        del self.entries[entry.request_id]
        self.planner.mirror.leave(entry)

    def _rebuild(self, now_s: float) -> None:
        """Make the view anew from what vLLM holds, under the strategy in force."""
        self._use(self.planner.decider.strategy, now_s)
        self.planner.counts["views made anew"] += 1

    def _use(self, strategy: Strategy, now_s: float) -> None:
        mirror = self.planner.fresh(strategy)
        known, self.entries = self.entries, {}
        self.planner.mirror = mirror
        for request_id, request in self.engine.requests.items():
            if request.is_finished():
                continue  # it only keeps its KV for a decode engine that will fetch it
            entry = known.get(request_id)
            if entry is None or entry.request is not request:
                self._enter(request, now_s)
                entry = self.entries[request_id]
                mirror.leave(entry)
            self.entries[request_id] = entry
            status = request.status.name
            if status == "RUNNING":
                if request.num_output_tokens:
                    mirror.emitted(entry, request.num_output_tokens, request.num_tokens, now_s)
                elif request.num_computed_tokens < entry.prompt_tokens:
                    mirror.computed(entry, request.num_computed_tokens, now_s)
            elif status != "PREEMPTED" and not request.num_computed_tokens:
                mirror.arrive(entry, now_s)
        self._stale = False

    def _take_news(self, now_s: float) -> None:
        """Take up what the control plane sent."""
        if self.control_plane is None or not self.control_plane.news:
            return
        news = self.control_plane.news.popleft()
        if isinstance(news, NewStrategy):
            self._use(news.strategy, now_s)
            self.strategy_name = f"{news.name} ({news.strategy.text})"
        elif isinstance(news, NewStepTimes):
            self.planner.use_step_times(news.step_times, now_s)
            self.step_times_from = f"control plane, model {news.version}"

    def _failed(self, problem: Exception) -> None:
        """Count what went wrong in Kairos itself, and say it once a minute."""
        self._stale = True
        self.planner.counts[f"failed {type(problem).__name__}"] += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            _log.warning("kairos: first come, first served for this step", exc_info=problem)

    # -- for people

    def status(self) -> EngineStatus:
        """What `kairos doctor` says; called by the background thread."""
        step_p50_s, _ = self.steps.percentiles()
        overhead_p50_s, overhead_p99_s = self.overhead.percentiles()
        found = engine_version()
        control_plane = self.control_plane
        return EngineStatus(
            kairos=__version__,
            engine="vllm",
            engine_version=found,
            tested=found.partition("+")[0] in TESTED,
            pid=os.getpid(),
            run=self.run,
            written_s=time.time(),
            started_s=self.started_at,
            profile_id=self.profile.profile_id,
            strategy=self.strategy_name,
            step_times=self.step_times_from,
            decides=decides(self.planner),
            stops_stalls=self.planner.limit.active,
            steps=self.overhead.count,
            step_p50_s=number(step_p50_s),
            overhead_p50_s=number(overhead_p50_s),
            overhead_p99_s=number(overhead_p99_s),
            counts=as_counts(self.planner.counts),
            fallbacks=as_counts(self.planner.validity.fallbacks),
            control_plane=control_plane.url if control_plane else None,
            reached_s=control_plane.reached_s if control_plane else None,
            exchanged=as_counts(control_plane.counts) if control_plane else {},
        )


def decides(planner: Planner) -> list[str]:
    """What of the strategy takes effect in this engine."""
    rule = planner.mirror.lane.rule
    told = ["order of waiting prompts", "who takes part in a decode step", "admission to decode before KV is taken"]
    if rule.preempt:
        told.append("running prompts yield at chunk ends")
    if rule.packs:
        told.append("which prompts share a step")
    if planner.limits.chunks:
        told.append("prompt tokens beside decodes")
    return told


def check_engine(engine: Any) -> None:
    """Refuse a vLLM in which the plugin cannot work.

    Raises:
        ConfigError: what is missing, and which versions are known to work.
    """
    missing = [name for name in NEEDED if not hasattr(engine, name)]
    if not missing:
        from vllm.v1.request import Request

        if "next_decode_eligible_step" not in Request.__init__.__code__.co_names:
            missing = ["Request.next_decode_eligible_step"]
    if missing:
        raise ConfigError(
            f"vLLM {engine_version()} has no {missing[0]}: the Kairos scheduler does not work in it; "
            f"it was run with {', '.join(TESTED)}"
        )
    if engine.scheduler_config.policy != "fcfs":
        raise ConfigError(
            f"--scheduling-policy {engine.scheduler_config.policy} and the Kairos scheduler both order requests; "
            "leave out one of them"
        )


def engine_version() -> str:
    """The version of vLLM."""
    return installed_version("vllm")


def profile_of(config: Any) -> Profile:
    """The profile as vLLM's configuration tells it."""
    from vllm.platforms import current_platform

    parallel = config.parallel_config
    tp = parallel.tensor_parallel_size
    try:
        gpu = str(current_platform.get_device_name())
    except Exception:  # a platform that does not tell
        gpu = "unknown"
    names = config.model_config.served_model_name
    name = names[0] if isinstance(names, list) and names else names
    return Profile(
        gpu=gpu or "unknown",
        model=str(name or config.model_config.model)[-128:],
        precision=str(config.model_config.dtype).removeprefix("torch."),
        tp=tp,
        ep=tp if parallel.enable_expert_parallel else 1,
        engine="vllm",
    )


def limits_of(engine: Any) -> Limits:
    """What this vLLM can do at all."""
    block = engine.block_size
    whole_blocks = getattr(engine, "need_mamba_block_aligned_split", False)
    return Limits(
        step_tokens=engine.max_num_scheduled_tokens,
        least_prompt_tokens=max(LEAST_PROMPT_TOKENS, block) if whole_blocks else LEAST_PROMPT_TOKENS,
        batch_requests=engine.max_num_running_reqs,
        kv_tokens=engine.kv_cache_config.num_blocks * block,
        chunks=engine.scheduler_config.enable_chunked_prefill,
    )
