"""Code that takes too long is stopped, and nothing else is."""

from __future__ import annotations

import threading
import time

import pytest

from optiq.chat.time_limit import time_limit


def forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("threaded", [False, True])
def test_what_never_ends_is_stopped(threaded: bool) -> None:
    raised = []

    def run() -> None:
        try:
            with time_limit(0.05):
                forever()
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
    with time_limit(60):
        result = sum(range(10))
    assert result == 45
    with pytest.raises(ValueError, match="mine"), time_limit(60):
        raise ValueError("mine")


def test_the_limit_never_strikes_after_its_body() -> None:
    """The body ends at about the time the limit does: either in it, or not at all."""
    late = 0
    for _ in range(60):
        try:
            with time_limit(0.002):
                time.sleep(0.002)
        except TimeoutError:
            late += 1
        sum(range(2000))  # where a late one would strike
    time.sleep(0.05)
    assert 0 <= late <= 60


def test_limits_leave_no_threads() -> None:
    before = threading.active_count()
    for _ in range(20):
        with time_limit(60):
            pass
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
