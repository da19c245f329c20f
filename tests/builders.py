"""Values for tests, with round numbers: write what a test is about, leave the rest to the defaults.

An instance here computes 1,000 prompt tokens a second and takes 10 ms a decode step plus 1 ms a participant, with no
cost of context: times can be worked out by hand.
"""

from collections.abc import Sequence

from kairos.scheduler_core.decider import decode_view
from kairos.scheduler_core.domain import (
    Control,
    DecodeInstance,
    Line,
    LinearStepTimes,
    PrefillInstance,
    RequestId,
    Resident,
    StepTimes,
    Waiting,
)
from kairos.scheduler_core.policy import DecodeView, Peer, PrefillView
from kairos.scheduler_core.queue import WaitingQueue
from kairos.scheduler_core.slo import token_deadline_s, ttft_deadline_s

NO_LIMIT = 2**62


def step_times(
    prefill: tuple[float, float, float] = (0.0, 1e-3, 0.0), decode: tuple[float, float, float] = (0.01, 1e-3, 0.0)
) -> LinearStepTimes:
    """Linear step times: (a_s, b_s, c_s) of each kind of step."""
    return LinearStepTimes(Line(*prefill), Line(*decode))


def prefill_instance(
    instance_id: str = "prefill-0",
    times: StepTimes | None = None,
    chunk_tokens: int | None = None,
    max_requests_per_step: int = 1,
    control: Control = Control.ENGINE,
) -> PrefillInstance:
    """A prefill instance; whole prompts, one a step."""
    return PrefillInstance(instance_id, times or step_times(), chunk_tokens, max_requests_per_step, control)


def decode_instance(
    instance_id: str = "decode-0",
    times: StepTimes | None = None,
    max_batch: int = 64,
    kv_tokens: int = NO_LIMIT,
    batch_limit: int = NO_LIMIT,
    control: Control = Control.ENGINE,
) -> DecodeInstance:
    """A decode instance without a limit but `max_batch`."""
    return DecodeInstance(instance_id, times or step_times(), max_batch, kv_tokens, batch_limit, control)


def waiting(
    request_id: RequestId,
    prefill_s: float = 1.0,
    *,
    arrival_s: float = 0.0,
    ttft_target_s: float = 10.0,
    prompt_tokens: int | None = None,
    prefilled_tokens: int = 0,
    cached_tokens: int = 0,
    total_prefill_s: float | None = None,
    tenant: str = "",
    weight: float = 1.0,
) -> Waiting:
    """A waiting request with `prefill_s` seconds of work left: so many thousand tokens, unless told otherwise."""
    prompt = round(prefill_s * 1_000) + prefilled_tokens + cached_tokens if prompt_tokens is None else prompt_tokens
    return Waiting(
        request_id,
        arrival_s,
        prompt,
        ttft_target_s,
        ttft_deadline_s(arrival_s, ttft_target_s),
        prefill_s,
        prefill_s if total_prefill_s is None else total_prefill_s,
        cached_tokens,
        prefilled_tokens,
        tenant=tenant,
        weight=weight,
    )


def prefill_view(
    now_s: float,
    requests: Sequence[Waiting],
    *,
    instance: PrefillInstance | None = None,
    wanted: int | None = None,
    peers: Sequence[Peer] = (),
) -> PrefillView:
    """What a prefill policy sees of these requests, asked for all of them unless told otherwise."""
    queue = WaitingQueue(requests, now_s)
    return PrefillView(
        now_s,
        instance or prefill_instance(),
        queue.by_arrival,
        queue.by_deadline,
        queue.lost,
        len(requests) if wanted is None else wanted,
        peers,
    )


def resident(
    request_id: RequestId,
    context_tokens: int = 1_000,
    *,
    output_tokens: int = 1,
    first_token_s: float = 0.0,
    tpot_target_s: float = 0.05,
    last_token_s: float | None = None,
) -> Resident:
    """A request in decode that has emitted `output_tokens`, the last of them just when it was due."""
    on_time_s = token_deadline_s(first_token_s, tpot_target_s, output_tokens - 1)
    return Resident(
        request_id,
        context_tokens,
        output_tokens,
        first_token_s,
        token_deadline_s(first_token_s, tpot_target_s, output_tokens),
        tpot_target_s,
        first_token_s,
        on_time_s if last_token_s is None else last_token_s,
    )


def decode_view_of(
    now_s: float,
    residents: Sequence[Resident] = (),
    ready: Sequence[Resident] = (),
    instance: DecodeInstance | None = None,
) -> DecodeView:
    """What a decode policy sees of these residents and ready ones."""
    return decode_view(now_s, instance or decode_instance(), list(residents), list(ready))
