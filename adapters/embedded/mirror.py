"""An engine's requests as policies see them, kept up to date step by step rather than made anew for each."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from kairos.scheduler_core.decider import Decider, PrefillLane
from kairos.scheduler_core.domain import DecodeInstance, PrefillInstance, RequestId, Resident, Waiting
from kairos.scheduler_core.policy import DecodeView
from kairos.scheduler_core.slo import NO_TARGET_S, token_deadline_s, ttft_deadline_s

_target_s = attrgetter("tpot_target_s")


class Entry:
    """One request of the engine; the engine's plugin owns it, the mirror keeps what is derived."""

    __slots__ = (
        "arrival_s",
        "cached_tokens",
        "deadline_s",
        "first_token_s",
        "held_since_s",
        "output_tokens",
        "prompt_tokens",
        "remote",
        "request",
        "request_id",
        "slo_class",
        "tpot_target_s",
        "ttft_target_s",
    )

    def __init__(
        self,
        request_id: RequestId,
        request: Any,
        arrival_s: float,
        prompt_tokens: int,
        targets: tuple[float, float],
        slo_class: str,
        remote: bool,
    ) -> None:
        self.request_id = request_id
        self.request = request
        """The engine's own object."""
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.ttft_target_s, self.tpot_target_s = targets
        self.deadline_s = ttft_deadline_s(arrival_s, self.ttft_target_s)
        self.slo_class = slo_class
        self.remote = remote
        """Whether another engine computes its prompt."""
        self.cached_tokens = 0
        """Of its prompt, in the prefix cache, where the engine says so before it starts."""
        self.first_token_s = 0.0
        self.output_tokens = 0
        self.held_since_s: float | None = None
        """Since when it runs and takes part in no step; None: it took part in the last."""


class Mirror:
    """The prefill lane, the decode batch, and who waits for it.

    A request is in one of these places, or in none: one that was preempted, or whose KV is on its way, is the engine's
    own affair until it decodes again.
    """

    def __init__(self, decider: Decider, prefill: PrefillInstance, decode: DecodeInstance) -> None:
        self.decider = decider
        self.lane: PrefillLane = decider.prefill_lane(prefill, decider.prefill_rule())
        self.decode = decode
        self.decode_policy = decider.decode_policy(decode)
        self.begun: dict[RequestId, Entry] = {}
        """Prompts that are partly computed and hold KV."""
        self.ready: dict[RequestId, Resident] = {}
        """Prompts that another engine computed, in arrival order, no KV taken here."""
        self.residents: dict[RequestId, Resident] = {}
        """The decode batch, in the order of first tokens."""
        self.sum_context_tokens = 0
        """Of the residents."""

    def arrive(self, entry: Entry, now_s: float) -> None:
        """Take in a request that has computed nothing here."""
        if entry.remote:
            due_s = entry.deadline_s
            self.ready[entry.request_id] = Resident(
                entry.request_id,
                entry.prompt_tokens + 1,
                0,
                now_s,
                due_s,
                entry.tpot_target_s,
                now_s,
                now_s,
                entry.slo_class,
            )
        else:
            self.lane.own.add(self._waiting(entry, 0), now_s)

    def computed(self, entry: Entry, tokens: int, now_s: float) -> None:
        """A part of its prompt, `tokens` so far, is computed or in the running step."""
        self.begun[entry.request_id] = entry
        own = self.lane.own
        if self.lane.rule.preempt:
            if entry.request_id in own:
                own.replace(self._waiting(entry, tokens), now_s)
            else:
                own.add(self._waiting(entry, tokens), now_s)
        elif entry.request_id in own:
            own.remove(entry.request_id)  # nothing may take its place: it is no candidate any more

    def prompt_done(self, entry: Entry) -> None:
        """Its whole prompt is computed or in the running step, or it has left the queue for the engine's own list."""
        request_id = entry.request_id
        self.begun.pop(request_id, None)
        self.ready.pop(request_id, None)
        if request_id in self.lane.own:
            self.lane.own.remove(request_id)

    def emitted(self, entry: Entry, output_tokens: int, context_tokens: int, now_s: float) -> None:
        """It has `output_tokens` now, of which the mirror knew fewer."""
        resident = self.residents.get(entry.request_id)
        if not entry.output_tokens:
            entry.first_token_s = now_s
        entry.output_tokens = output_tokens
        due_s = token_deadline_s(entry.first_token_s, entry.tpot_target_s, output_tokens)
        if resident is None:
            self.residents[entry.request_id] = Resident(
                entry.request_id,
                context_tokens,
                output_tokens,
                entry.first_token_s,
                due_s,
                entry.tpot_target_s,
                entry.first_token_s,
                now_s,
                entry.slo_class,
            )
            self.sum_context_tokens += context_tokens
            return
        self.sum_context_tokens += context_tokens - resident.context_tokens
        resident.context_tokens = context_tokens
        resident.output_tokens = output_tokens
        resident.due_s = due_s
        resident.last_token_s = now_s

    def leave(self, entry: Entry) -> None:
        """It ended, was aborted, or lost its KV."""
        self.prompt_done(entry)
        self.lane.guard.release(entry.request_id)
        resident = self.residents.pop(entry.request_id, None)
        if resident is not None:
            self.sum_context_tokens -= resident.context_tokens
        entry.held_since_s = None

    def decode_view(self, now_s: float) -> DecodeView:
        """What the decode policy sees."""
        residents: Sequence[Resident] = list(self.residents.values())
        tightest_s = min(map(_target_s, residents), default=NO_TARGET_S)
        ready = list(self.ready.values()) if self.ready else ()
        return DecodeView(now_s, self.decode, residents, ready, self.sum_context_tokens, tightest_s)

    def with_step_times(self, prefill: PrefillInstance, decode: DecodeInstance, now_s: float) -> None:
        """Other step times: every prediction is made again."""
        lane = self.lane
        lane.instance, self.decode = prefill, decode
        for waiting in list(lane.own.by_arrival):
            left_s = self._seconds(waiting.remaining_tokens, waiting.context_tokens)
            total_s = self._seconds(waiting.prompt_tokens, 0)
            lane.own.replace(msgspec.structs.replace(waiting, prefill_s=left_s, total_prefill_s=total_s), now_s)

    def _waiting(self, entry: Entry, computed_tokens: int) -> Waiting:
        prompt, cached = entry.prompt_tokens, min(entry.cached_tokens, entry.prompt_tokens)
        computed_tokens = max(computed_tokens, cached)
        return Waiting(
            entry.request_id,
            entry.arrival_s,
            prompt,
            entry.ttft_target_s,
            entry.deadline_s,
            self._seconds(prompt - computed_tokens, computed_tokens),
            self._seconds(prompt - cached, cached),
            cached,
            computed_tokens - cached,
            entry.slo_class,
        )

    def _seconds(self, tokens: int, context_tokens: int) -> float:
        instance = self.lane.instance
        return instance.step_times.remaining_prefill_s(tokens, context_tokens, instance.chunk_tokens)


def hold(entries: Iterable[Entry], now_s: float, longest_s: float) -> list[Entry]:
    """Those of the entries that may be held for this step: none longer than `longest_s` in a row."""
    held = []
    for entry in entries:
        if entry.held_since_s is None:
            entry.held_since_s = now_s
        if now_s - entry.held_since_s < longest_s:
            held.append(entry)
    return held
