"""What a vLLM step held, as a `StepRecord` and as one of Dynamo's forward-pass metrics."""

from collections.abc import Sequence
from typing import NamedTuple

from kairos.adapters.embedded.mirror import Entry
from kairos.scheduler_core.domain import Part
from kairos.scheduler_core.policy import DecodeStep
from kairos.scheduler_core.telemetry import StepRecord


class StepShape(NamedTuple):
    """What a step holds, known when it is scheduled."""

    prompts: Sequence[tuple[Entry, Part]]
    """Requests with prompt tokens in it."""
    done: Sequence[str]
    """Those whose prompt it completes."""
    decodes: Sequence[Entry]
    sum_context_tokens: int
    """Of the requests in decode, before the step."""
    sum_square_context: int
    longest_context_tokens: int
    scheduled_s: float

    @property
    def new_tokens(self) -> int:
        """Prompt tokens computed."""
        return sum(part.new_tokens for _, part in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """KV that is there for those prompts."""
        return sum(part.context_tokens for _, part in self.prompts)

    @property
    def phase(self) -> str:
        """In the words of telemetry."""
        if not self.decodes:
            return "context" if self.prompts else "idle"
        return "mixed" if self.prompts else "decode"


def shape_of(entries: dict[str, Entry], num_scheduled_tokens: dict[str, int], now_s: float) -> StepShape:
    """What a step holds, from vLLM's output; read after vLLM has counted its tokens as computed."""
    prompts: list[tuple[Entry, Part]] = []
    done: list[str] = []
    decodes: list[Entry] = []
    sum_context = sum_square = longest = 0
    for request_id, tokens in num_scheduled_tokens.items():
        entry = entries[request_id]
        entry.held_since_s = None
        request = entry.request
        before = request.num_computed_tokens - tokens
        known = request.num_tokens
        if before >= entry.prompt_tokens - entry.remote and before >= known - 1:
            decodes.append(entry)
            sum_context += before
            sum_square += before * before
            if before > longest:
                longest = before
            continue
        prompts.append((entry, Part(tokens, before)))
        if before + tokens >= known:
            done.append(request_id)
    return StepShape(prompts, done, decodes, sum_context, sum_square, longest, now_s)


def record_of(shape: StepShape, seconds: float, prev_phase: str, run: str) -> StepRecord:
    """The step as telemetry."""
    prompts, decodes = len(shape.prompts), len(shape.decodes)
    return StepRecord(
        kind="mixed" if prompts and decodes else "decode" if decodes else "prefill",
        step_s=seconds,
        n_requests=prompts,
        new_tokens=shape.new_tokens,
        cached_tokens=shape.cached_tokens,
        batch_size=decodes,
        sum_context_tokens=shape.sum_context_tokens,
        prev_phase=prev_phase,
        run=run,
    )


def decode_step_of(shape: StepShape, seconds: float, finished_output_tokens: Sequence[int]) -> DecodeStep:
    """The step as policies learn from it."""
    return DecodeStep(
        seconds,
        len(shape.decodes),
        shape.sum_context_tokens,
        shape.longest_context_tokens,
        finished_output_tokens,
    )
