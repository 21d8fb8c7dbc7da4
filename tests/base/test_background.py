"""Work in the background: what it gives, what it raises, and where."""

from __future__ import annotations

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
