"""The page a policy author reads: the five kinds of policy, the view each is shown, the answer each gives.

A policy is a small class with one public method; its parameters are arguments of `__init__`, with defaults. It is
deterministic: no clock, no I/O, no randomness; it reads the view and changes nothing in it. A policy with memory keeps
all of it in an attribute `state` (one `msgspec.Struct`) and may take `observe(step)`; the state belongs to the instance
or queue that the policy serves. The output length of a request is in no view: nobody knows it.

`kairos.policies.checks.check_policy(cls)` runs the contract on a class.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from kairos.scheduler_core.domain import DecodeInstance, PrefillInstance, RequestId, Resident, Waiting
from kairos.scheduler_core.slo import NO_TARGET_S

# -- prefill: which waiting request runs next ------------------------------------------------------------------------


class Peer(msgspec.Struct, frozen=True, gc=False):
    """Another prefill instance that takes work from the same queue."""

    instance_id: str
    free_at_s: float
    """Predicted end of what it runs now; at most `now_s` when idle."""
    bound: Sequence[Waiting] = ()
    """Prompts it has begun and must finish itself, as it sees them."""
    prefill_s: Callable[[Waiting], float] | None = None
    """Predicted remaining seconds of a request on it; None: the same as on the asking instance."""
    saved_s: Callable[[Waiting], float] | None = None
    """Seconds of a request that its larger prefix hit saves over the asking instance; None: it caches no prefixes."""


class PrefillView(msgspec.Struct, frozen=True, gc=False):
    """What a prefill policy sees when an instance can take work."""

    now_s: float
    instance: PrefillInstance
    waiting: Sequence[Waiting]
    """In arrival order (ties: id). With the option `lost_last` only those that can still be on time."""
    by_deadline: Sequence[Waiting] = ()
    """Those that can still be on time, by (deadline, id)."""
    lost: Sequence[Waiting] = ()
    """Those that cannot, in arrival order."""
    wanted: int = 1
    """How many of the answer's first requests will be used; the rest of the order may be left out."""
    peers: Sequence[Peer] = ()


class PrefillPlan(msgspec.Struct, frozen=True, gc=False):
    """An order, and how many of its first requests share the next step."""

    order: Sequence[RequestId]
    together: int = 1


@runtime_checkable
class PrefillPolicy(Protocol):
    """Orders the waiting requests. The options `lost_last` and `preempt` are applied around it, not in it."""

    def order(self, view: PrefillView) -> Sequence[RequestId]:
        """Ids, the first to run first; at least `view.wanted` of them, or all there are."""
        ...


@runtime_checkable
class PackingPrefillPolicy(Protocol):
    """A prefill policy that also chooses how many prompts share a step.

    It decides at every chunk end, unfinished prompts included, and treats lost requests itself: the options
    `lost_last` and `preempt` do not apply to it.
    """

    def plan(self, view: PrefillView) -> PrefillPlan:
        """An order of at least `view.wanted` ids, or all there are, and how many of the first share the step."""
        ...


def first_by(
    view: PrefillView, waiting: Sequence[Waiting], rank: Callable[[Waiting], Any], wanted: int | None = None
) -> list[RequestId]:
    """The ids of the lowest `rank`, ties to the earliest place in `waiting`, no more of them than are wanted."""
    count = view.wanted if wanted is None else wanted
    return [w.request_id for w in heapq.nsmallest(count, waiting, key=rank)]


# -- decode: who is admitted, who takes part in the next step --------------------------------------------------------


class DecodeView(msgspec.Struct, frozen=True, gc=False):
    """What a decode policy sees before a step of its instance."""

    now_s: float
    instance: DecodeInstance
    residents: Sequence[Resident]
    """In the order they were admitted."""
    ready: Sequence[Resident]
    """Those whose KV is there, in ready order; swapped-out ones at the front."""
    sum_context_tokens: int
    """Of the residents."""
    tightest_tpot_s: float = NO_TARGET_S
    """Smallest TPOT target among the residents."""

    def fits(self, request: Resident, batch_size: int, sum_context_tokens: int) -> bool:
        """Whether there is KV room for `request` beside residents of that number and context sum.

        An empty instance takes any request: it could never run otherwise.
        """
        return (
            batch_size == 0 or sum_context_tokens + request.context_tokens + batch_size + 1 <= self.instance.kv_tokens
        )


class DecodePlan(msgspec.Struct, frozen=True, gc=False):
    """Who leaves, who joins, who takes part: carried out in this order."""

    admit: Sequence[RequestId] = ()
    step: Sequence[RequestId] | None = None
    """Participants of the step, admitted ones included; None = everyone."""
    swap_out: Sequence[RequestId] = ()


@runtime_checkable
class DecodePolicy(Protocol):
    """Fills and steps the decode batch of one instance."""

    def step(self, view: DecodeView) -> DecodePlan:
        """Whom to admit and who takes part in the next step."""
        ...


Room = Callable[[Resident, int, int], bool]
"""Whether a request may join residents of that number and context sum, KV room aside."""


def admit_while(view: DecodeView, ready: Sequence[Resident], room: Room) -> list[RequestId]:
    """Ids of `ready` in its order while KV and `room` last; the first that does not fit ends it (no overtaking).

    An empty instance takes the first one whatever it needs.
    """
    admitted: list[RequestId] = []
    batch_size, sum_context_tokens = len(view.residents), view.sum_context_tokens
    for request in ready:
        if batch_size and not (
            view.fits(request, batch_size, sum_context_tokens) and room(request, batch_size, sum_context_tokens)
        ):
            break
        admitted.append(request.request_id)
        batch_size += 1
        sum_context_tokens += request.context_tokens
    return admitted


# -- placement: which instance ---------------------------------------------------------------------------------------


class PrefillLoad(msgspec.Struct, frozen=True, gc=False):
    """A prefill instance as a placement policy sees it, for one arriving request."""

    instance: PrefillInstance
    waiting_requests: int
    tokens_in_flight: int
    """Tokens still to compute of all requests bound to it."""
    outstanding_s: float
    """Predicted seconds of all work bound to it."""
    prefill_s: float
    """Predicted seconds of the arriving request on it."""
    cached_tokens: int = 0
    """Of the arriving request, in its KV cache."""


class PrefillPlacementView(msgspec.Struct, frozen=True, gc=False):
    """What a prefill placement policy sees when a request arrives."""

    now_s: float
    request: Waiting
    instances: Sequence[PrefillLoad]


@runtime_checkable
class PrefillPlacementPolicy(Protocol):
    """Binds an arriving request to a prefill instance, or leaves it in the shared queue."""

    def place_prefill(self, view: PrefillPlacementView) -> str | None:
        """An instance id; None: the instance that first has room takes it."""
        ...


class DecodeLoad(msgspec.Struct, frozen=True, gc=False):
    """A decode instance as a placement policy sees it."""

    instance: DecodeInstance
    batch_size: int
    sum_context_tokens: int
    waiting_requests: int
    """Placed there and not admitted, swapped-out ones included."""
    waiting_context_tokens: int
    tightest_tpot_s: float = NO_TARGET_S
    """Smallest TPOT target among its residents and waiting ones."""


class DecodePlacementView(msgspec.Struct, frozen=True, gc=False):
    """What a decode placement policy sees."""

    now_s: float
    request: Resident
    instances: Sequence[DecodeLoad]


@runtime_checkable
class DecodePlacementPolicy(Protocol):
    """Chooses the decode instance of a request."""

    def place_decode(self, view: DecodePlacementView) -> str:
        """An instance id."""
        ...


# -- admission: take it or refuse it ---------------------------------------------------------------------------------


class AdmissionView(msgspec.Struct, frozen=True, gc=False):
    """What an admission policy sees when a request arrives."""

    now_s: float
    request: Waiting
    predicted_ttft_s: float
    """Lower-quantile TTFT with the queue under the active policy; NaN unless the policy sets `needs_prediction`."""
    others_waiting: int


class Admission(msgspec.Struct, frozen=True, gc=False):
    """Accepted, or refused with a status, a reason code and when to come back."""

    accept: bool
    status: int = 200
    reason: str = ""
    retry_after_s: int = 0


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Accepts or refuses an arriving request."""

    needs_prediction: bool

    def admit(self, view: AdmissionView) -> Admission:
        """Whether the request is taken."""
        ...


# -- memory ----------------------------------------------------------------------------------------------------------


class PrefillStep(msgspec.Struct, frozen=True, gc=False):
    """A prefill step that ended, for policies that learn from it."""

    seconds: float
    new_tokens: int


class DecodeStep(msgspec.Struct, frozen=True, gc=False):
    """A decode step that ended; contexts as they were before it."""

    seconds: float
    batch_size: int
    sum_context_tokens: int
    longest_context_tokens: int
    finished_output_tokens: Sequence[int] = ()
    """Output lengths of the requests that ended with it."""


@runtime_checkable
class Observer(Protocol):
    """A policy that wants to see the steps of its instance or queue."""

    def observe(self, step: Any) -> None:
        """Take in a `PrefillStep` or a `DecodeStep`."""
        ...
