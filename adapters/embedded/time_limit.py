"""An end to decisions that do not end: a timer signal raises inside the policy."""

import signal
import threading
from types import FrameType

from kairos.scheduler_core.errors import PolicyError


class DecisionTimeout(PolicyError):
    """A decision was stopped at its budget."""


class TimeLimit:
    """A context in which Python code that runs longer than `budget_s` gets a `DecisionTimeout`.

    Signals reach the main thread alone: elsewhere, and where the program uses SIGALRM itself, `active` is False and
    nothing is stopped; a decision that ends late is then only noticed by the budget of the guard. Code in C is stopped
    when it returns.

    Args:
        watch: False: nothing is stopped.
    """

    _armed: "TimeLimit | None" = None
    """The one whose time runs; there is one main thread, and so at most one."""

    def __init__(self, budget_s: float, watch: bool = True) -> None:
        self.budget_s = budget_s
        handler = signal.getsignal(signal.SIGALRM)
        free = handler in (signal.SIG_DFL, signal.SIG_IGN, _expired)
        self.active = watch and free and threading.current_thread() is threading.main_thread()
        if self.active:
            signal.signal(signal.SIGALRM, _expired)

    def __enter__(self) -> None:
        if self.active:
            TimeLimit._armed = self
            signal.setitimer(signal.ITIMER_REAL, self.budget_s)

    def __exit__(self, *_: object) -> None:
        if self.active:
            TimeLimit._armed = None  # first: a signal that is on its way finds nothing to stop
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _expired(signum: int, frame: FrameType | None) -> None:
    running, TimeLimit._armed = TimeLimit._armed, None
    if running is not None:
        raise DecisionTimeout(f"took more than its budget of {running.budget_s * 1e3:.0f} ms, and was stopped")
