"""An end to decisions that do not end."""

import signal
import threading

import pytest

from kairos.adapters.embedded.time_limit import DecisionTimeout, TimeLimit


def test_a_loop_without_end_is_stopped() -> None:
    def decide() -> None:
        with TimeLimit(0.01):
            while True:
                pass

    with pytest.raises(DecisionTimeout, match="10 ms"):
        decide()


def test_afterwards_no_timer_runs() -> None:
    with TimeLimit(10.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0

    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_outside_a_decision_stops_nothing() -> None:
    TimeLimit(0.01)

    signal.raise_signal(signal.SIGALRM)


def test_outside_the_main_thread_nothing_is_stopped() -> None:
    made: list[TimeLimit] = []
    thread = threading.Thread(target=lambda: made.append(TimeLimit(0.01)))
    thread.start()
    thread.join()

    assert not made[0].active


def test_a_program_that_uses_the_signal_itself_keeps_it() -> None:
    before = signal.signal(signal.SIGALRM, lambda signum, frame: None)
    try:
        assert not TimeLimit(0.01).active
    finally:
        signal.signal(signal.SIGALRM, before)
