"""Code that takes too long is stopped, and nothing else is."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from optiq.chat.time_limit import within


def forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("threaded", [False, True])
def test_what_never_ends_is_stopped(threaded: bool) -> None:
    raised = []

    def run() -> None:
        try:
            within(0.05, forever)
        except TimeoutError as error:
            raised.append(error)

    if threaded:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
    else:
        run()
    assert len(raised) == 1


def test_what_ends_in_time_is_left_alone() -> None:
    assert within(60, lambda: sum(range(10))) == 45
    with pytest.raises(ValueError, match="mine"):
        within(60, lambda: raise_(ValueError("mine")))
    with pytest.raises(TimeoutError):
        within(0.001, lambda: [time.sleep(0.001) for _ in range(10_000)])


@pytest.mark.parametrize("raises", [False, True])
def test_the_limit_never_strikes_afterwards(raises: bool) -> None:
    """The call ends at about the time that the limit does: it strikes in it, or not at all."""
    for number in range(60):
        with contextlib.suppress(TimeoutError, ValueError):
            within(number / 20_000, lambda: raise_(ValueError()) if raises else time.sleep(0.001))
        sum(range(2000))  # where a late one would strike
    time.sleep(0.05)


def test_limits_leave_no_threads() -> None:
    before = threading.active_count()
    for _ in range(20):
        within(60, lambda: None)
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def raise_(error: Exception) -> None:
    raise error
