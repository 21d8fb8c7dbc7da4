"""Work in the background: what it gives, what it raises, and that it gives way."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from optiq.base.background import in_background


def test_it_returns_and_raises_what_the_work_does() -> None:
    assert in_background(lambda: 3) == 3
    with pytest.raises(KeyError, match="gone"):
        in_background(lambda: {}["gone"])


def test_all_of_it_is_one_thread() -> None:
    """Each thread that has used MLX keeps a stream."""
    threads = {in_background(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has one priority")
def test_only_that_thread_gives_way() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = nice()
    assert in_background(nice) > min(mine, 18)
    assert nice() == mine
