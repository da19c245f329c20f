"""The two guards around every policy: a share of time for who was passed over, arrival order when a policy fails."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kairos.scheduler_core.domain import RequestId, Resident, Waiting
from kairos.scheduler_core.errors import PolicyError
from kairos.scheduler_core.policy import DecodePlan, DecodeView

_log = logging.getLogger(__name__)

_LOG_EVERY_S = 60.0


class ShareGuard:
    """Lost and deferred requests own a share of an instance's prefill time (docs/policies.md, Guards).

    A bucket in predicted prefill seconds: it fills at share x busy time while such a request waits, holds at most the
    work of the oldest of them, and when it covers that one, it runs next, to its end.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"deferred_share is {share}; use 0 (off) up to below 1")
        self.share = share
        self.bucket_s = 0.0
        self.pinned: RequestId | None = None
        """The request it gave the floor to, until its prompt is done."""

    def covers(self, oldest: Waiting | None) -> bool:
        """Whether there is a request that is owed time and the bucket pays for it."""
        return oldest is not None and self.share > 0 and self.bucket_s >= oldest.prefill_s

    def give_floor(self, request: Waiting) -> None:
        """Let a covered request run to its end, and take its work from the bucket."""
        self.bucket_s -= request.prefill_s
        self.pinned = request.request_id

    def fill(self, busy_s: float, oldest: Waiting | None) -> None:
        """Account for a step of `busy_s` during which `oldest`, if any, waited for its due."""
        if oldest is not None and self.share:
            self.bucket_s = min(self.bucket_s + self.share * busy_s, oldest.prefill_s)

    def release(self, request_id: RequestId) -> None:
        """Forget a pinned request: its prompt is done, or it left."""
        if self.pinned == request_id:
            self.pinned = None


class ValidityGuard:
    """Counts the answers of policies that could not be used; logs each policy at most once a minute.

    Args:
        budget_s: a decision that takes longer is replaced too; None where no clock may matter (the simulator).
    """

    def __init__(self, budget_s: float | None = None, timer: Callable[[], float] = time.perf_counter) -> None:
        self.budget_s = budget_s
        self.fallbacks: Counter[str] = Counter()
        """Replaced decisions by `policy: error`."""
        self._timer = timer
        self.logged_s: dict[str, float] = {}
        """When each policy was last logged; whoever makes a guard for every decision hands the same on."""

    def start(self) -> float:
        """A mark for `check_budget`."""
        return 0.0 if self.budget_s is None else self._timer()

    def check_budget(self, started_s: float) -> None:
        """Raise PolicyError when the decision that began at the mark took too long."""
        if self.budget_s is not None and (took_s := self._timer() - started_s) > self.budget_s:
            raise PolicyError(f"took {took_s * 1e3:.1f} ms of a budget of {self.budget_s * 1e3:.1f} ms")

    def note(self, policy: object, problem: Exception) -> None:
        """Count a failure, and log it unless this policy was logged within the minute."""
        name = type(policy).__name__
        self.fallbacks[f"{name}: {type(problem).__name__}"] += 1
        now_s = self._timer()
        if now_s - self.logged_s.get(name, float("-inf")) >= _LOG_EVERY_S:
            self.logged_s[name] = now_s
            kind = type(problem).__name__
            _log.warning("policy %s failed, arrival order instead: %s", name, kind, exc_info=problem)


def check_order(order: Sequence[RequestId], needed: int, known: Callable[[RequestId], bool]) -> None:
    """Raise PolicyError unless the first `needed` ids exist and are distinct."""
    if len(order) < needed:
        raise PolicyError(f"ordered {len(order)} requests where {needed} were wanted")
    head = order[:needed]
    if len(set(head)) != needed:
        raise PolicyError("named a request twice")
    for request_id in head:
        if not known(request_id):
            raise PolicyError(f"named request {request_id!r}, which does not wait here")


def check_decode_plan(plan: DecodePlan, view: DecodeView) -> None:
    """Raise PolicyError unless the plan names existing requests once, fits the instance and lets someone run."""
    residents = {r.request_id: r for r in view.residents}
    sum_context = view.sum_context_tokens
    for request_id in plan.swap_out:
        leaving = residents.pop(request_id, None)
        if leaving is None:
            raise PolicyError(f"swaps out {request_id!r}, which is not resident")
        sum_context -= leaving.context_tokens
    if plan.admit:
        ready: dict[RequestId, Resident] = {r.request_id: r for r in view.ready}
        ready.update((r.request_id, r) for r in view.residents if r.request_id not in residents)
        for request_id in plan.admit:
            joining = ready.pop(request_id, None)
            if joining is None:
                raise PolicyError(f"admits {request_id!r}, which is not ready here")
            if not view.fits(joining, len(residents), sum_context):
                raise PolicyError(f"admits {request_id!r} past the KV capacity of {view.instance.kv_tokens} tokens")
            residents[request_id] = joining
            sum_context += joining.context_tokens
        if len(residents) > view.instance.batch_limit:
            raise PolicyError(f"holds {len(residents)} requests where the engine holds {view.instance.batch_limit}")
    if plan.step is not None:
        members = set(plan.step)
        if len(members) != len(plan.step) or not members <= residents.keys():
            raise PolicyError("lets a request take part twice, or one that is not resident")
        if not members and residents:
            raise PolicyError("lets nobody take part although requests are resident")
