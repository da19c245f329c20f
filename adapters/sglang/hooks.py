"""What Kairos does in SGLang: the order of waiting prompts, how far a chunked one holds back, admission to decode.

Every rank of a tensor-parallel engine runs its own scheduler over the same requests and must decide the same. So with
more than one rank no clock is read: time is the sum of the predicted seconds of the batches that every rank has run.
Idle time does not pass on it, and need not: nothing waits then. With one rank it is the real clock.
"""

import logging
import time
from collections.abc import Callable, MutableSequence, Sequence
from importlib.metadata import version as installed_version
from typing import Any

from kairos.adapters.embedded.mirror import Entry
from kairos.adapters.embedded.planner import Limits, Planner
from kairos.adapters.embedded.settings import EngineSettings, load_settings
from kairos.scheduler_core.decider import decode_view
from kairos.scheduler_core.domain import UNLIMITED_TOKENS, Part, Profile, RequestId, Resident
from kairos.scheduler_core.slo import token_deadline_s
from kairos.scheduler_core.strategy import parse_strategy

TESTED = ("0.5.23",)
WHOLE_PROMPTS = 16_384
"""Tokens of a step where SGLang does not chunk: its own default for a prefill batch."""
LOG_EVERY_S = 60.0

_log = logging.getLogger(__name__)


# -- the hooks -------------------------------------------------------------------------------------------------------


def after_init_schedule_policy(result: None, scheduler: Any) -> None:
    """The policy exists: Kairos is at its side from now on."""
    scheduler.policy.kairos = Kairos(scheduler, load_settings())
    _log.info("kairos %s orders the requests of sglang %s", scheduler.policy.kairos.text, installed_version("sglang"))


def after_calc_priority(
    result: None, policy: Any, waiting_queue: MutableSequence[Any], *_: object, **__: object
) -> None:
    """Sort the waiting prompts, after SGLang has matched their prefixes."""
    policy.kairos.guarded(policy.kairos.sort, waiting_queue)


def around_chunk_limit(
    original: Callable[..., int | None],
    policy: Any,
    chunked_req: Any,
    waiting_queue: Sequence[Any],
    budget: int,
    page_size: int,
) -> int | None:
    """Cap the prompt that is being chunked, so that more urgent ones fit into the batch."""
    limit = policy.kairos.guarded(policy.kairos.chunk_limit, chunked_req, waiting_queue, budget, page_size)
    stock = original(policy, chunked_req, waiting_queue, budget, page_size)
    return stock if limit is None else limit


def around_prebuilt_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Show SGLang only those that may join the decode batch."""
    kairos = scheduler.policy.kairos
    admitted = kairos.guarded(kairos.admitted, scheduler.waiting_queue, running_batch.reqs)
    if admitted is None:
        return original(scheduler, running_batch)
    chosen = {req.rid for req in admitted}
    held = [req for req in scheduler.waiting_queue if req.rid not in chosen]
    scheduler.waiting_queue = admitted
    try:
        return original(scheduler, running_batch)
    finally:
        scheduler.waiting_queue = [*scheduler.waiting_queue, *held]


def after_process_batch_result(result: None, scheduler: Any, batch: Any, *_: object) -> None:
    """A batch ended: so much time passed."""
    scheduler.policy.kairos.guarded(scheduler.policy.kairos.passed, batch)


# -- what they decide with -------------------------------------------------------------------------------------------


class Kairos:
    """The view and the policies of one SGLang scheduler."""

    def __init__(self, scheduler: Any, settings: EngineSettings) -> None:
        self.settings = settings
        self.text = settings.strategy
        ranks = scheduler.tp_size * getattr(scheduler, "pp_size", 1)
        self.predicted_s: float | None = 0.0 if ranks > 1 else None
        """The clock that all ranks share; None: the real one."""
        told = Profile("unknown", str(scheduler.server_args.served_model_name), tp=scheduler.tp_size, engine="sglang")
        self.planner = Planner(
            parse_strategy(settings.strategy),
            settings.step_times(settings.profile(told)),
            Limits(
                step_tokens=scheduler.chunked_prefill_size or WHOLE_PROMPTS,
                least_prompt_tokens=scheduler.page_size,
                batch_requests=scheduler.max_running_requests,
                kv_tokens=getattr(scheduler, "max_total_num_tokens", UNLIMITED_TOKENS),
            ),
            deferred_share=settings.deferred_share,
            budget_s=settings.decision_budget_s,
            longest_hold_s=settings.longest_hold_s,
            watch=ranks == 1,
        )
        self.waiting: dict[RequestId, Entry] = {}
        """Prompts that wait, as the view has them."""
        self._logged_s = float("-inf")

    @property
    def now_s(self) -> float:
        """The time of decisions."""
        return time.monotonic() if self.predicted_s is None else self.predicted_s

    def guarded(self, decide: Callable[..., Any], *arguments: Any) -> Any:
        """What `decide` answers; None when it fails, counted and said once a minute."""
        try:
            with self.planner.limit:
                return decide(*arguments)
        except Exception as problem:  # whatever it was: SGLang goes on as without Kairos, and the view is made anew
            planner = self.planner
            planner.counts[f"failed {type(problem).__name__}"] += 1
            planner.mirror, self.waiting = planner.fresh(planner.decider.strategy), {}
            if time.monotonic() - self._logged_s >= LOG_EVERY_S:
                self._logged_s = time.monotonic()
                _log.warning("kairos: SGLang decides alone this time", exc_info=problem)
            return None

    def sort(self, waiting: MutableSequence[Any]) -> None:
        """Put the waiting prompts into the order of the policy."""
        self._see(waiting)
        decider, lane, now_s = self.planner.decider, self.planner.mirror.lane, self.now_s
        decider.next_prefill(lane, now_s)  # notes who is owed time, or has the floor now
        order = decider.prefill_order(lane, now_s)
        place = {w.request_id: n for n, w in enumerate(order)}
        waiting[:] = sorted(waiting, key=lambda req: place.get(req.rid, len(place)))
        self.planner.counts["sorted"] += 1

    def chunk_limit(self, chunked_req: Any, waiting: Sequence[Any], budget: int, page_size: int) -> int | None:
        """Tokens that the chunked prompt may take; None: as SGLang would.

        What is kept free is for those that the policy puts before it and that fit whole, in whole pages: SGLang has
        one chunked prompt at a time and cannot park it, so it always goes on by a page.
        """
        mirror = self.planner.mirror
        if not mirror.lane.rule.preempt or budget < 2 * page_size:
            return None
        entry = self._entry(chunked_req)
        mirror.computed(entry, chunked_req.prefix_len, self.now_s)
        order = self.planner.decider.prefill_order(mirror.lane, self.now_s)
        mirror.prompt_done(entry)
        uncached = {req.rid: len(req.origin_input_ids) - req.num_matched_prefix_tokens for req in waiting}
        reserved = 0
        for w in order:
            if w.request_id == chunked_req.rid:
                break
            pages = -(-uncached.get(w.request_id, 0) // page_size)
            if reserved + pages * page_size > budget - page_size:
                break
            reserved += pages * page_size
        if not reserved:
            return None
        self.planner.counts["capped chunks"] += 1
        return (budget - reserved) // page_size * page_size

    def admitted(self, ready: Sequence[Any], running: Sequence[Any]) -> list[Any]:
        """Those of the ready requests that may join the decode batch, in order."""
        planner, now_s = self.planner, self.now_s
        view = decode_view(
            now_s, planner.mirror.decode, [self._resident(r) for r in running], [self._resident(r) for r in ready]
        )
        if not view.ready:
            return []
        decision = planner.decider.next_decode(planner.mirror.decode_policy, view)
        waiting = {req.rid: req for req in ready}
        longest_s = self.settings.longest_hold_s
        overdue = [rid for rid, req in waiting.items() if now_s - self._entry(req).arrival_s >= longest_s]
        chosen = dict.fromkeys([*overdue, *(i for i in decision.plan.admit if i in waiting)])
        planner.counts["admissions held"] += len(waiting) - len(chosen)
        return [waiting[rid] for rid in chosen]

    def passed(self, batch: Any) -> None:
        """Account for a batch that ended by what it was predicted to take: the shared clock, who is owed time."""
        planner, seconds = self.planner, 0.0
        if batch.forward_mode.is_decode():
            context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
            seconds = planner.step_times.decode_step_s(len(batch.reqs), context)
        elif batch.forward_mode.is_extend():
            parts = [Part(req.extend_len, req.prefix_len) for req in batch.reqs]
            seconds = planner.step_times.prefill_step_s(parts)
            planner.decider.prefill_ended(planner.mirror.lane, seconds, sum(part.new_tokens for part in parts), ())
        if self.predicted_s is not None:
            self.predicted_s += seconds

    def _see(self, waiting: Sequence[Any]) -> None:
        """Bring the view of waiting prompts up to date: who came, who left, and prefix hits as matched now."""
        own, mirror, now_s = self.planner.mirror.lane.own, self.planner.mirror, self.now_s
        here = {req.rid: self._entry(req) for req in waiting}
        for req in waiting:
            entry = here[req.rid]
            known = own.get(req.rid)
            if known is None or known.cached_tokens != req.num_matched_prefix_tokens:
                entry.cached_tokens = req.num_matched_prefix_tokens
                mirror.prompt_done(entry)
                mirror.arrive(entry, now_s)
        for request_id, entry in self.waiting.items():
            if request_id not in here:
                if (left := own.get(request_id)) is not None:
                    own.note_started(left)
                mirror.leave(entry)
        self.waiting = here

    def _entry(self, req: Any) -> Entry:
        """What is known of a request; kept at SGLang's own object, and gone with it."""
        entry: Entry | None = getattr(req, "kairos", None)
        if entry is None:
            told = req.sampling_params.custom_params or {}
            slo_class = str(told.get("kairos_class", "default"))
            targets = self.settings.targets_of(slo_class, told)
            entry = Entry(req.rid, req, self.now_s, len(req.origin_input_ids), targets, slo_class, remote=False)
            req.kairos = entry
        return entry

    def _resident(self, req: Any) -> Resident:
        entry, now_s = self._entry(req), self.now_s
        tokens = len(req.output_ids)
        if tokens and not entry.output_tokens:
            entry.first_token_s = now_s
        entry.output_tokens = tokens
        first_s = entry.first_token_s or now_s
        due_s = token_deadline_s(first_s, entry.tpot_target_s, tokens)
        context = entry.prompt_tokens + tokens
        return Resident(
            req.rid, context, tokens, first_s, due_s, entry.tpot_target_s, entry.arrival_s, now_s, entry.slo_class
        )
