"""Work beside a server's engine that uses MLX, in one thread.

MLX keeps a stream, with a thread of its own, for each thread that has used it. To make them anew
each time takes the cores from those who are answered.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .failures import forget_failures

T = TypeVar("T")

_thread = ThreadPoolExecutor(1, "optiq-background")


def in_background(work: Callable[[], T]) -> T:
    """What `work` returns or raises, when what was given before it is over."""
    return _thread.submit(_run, work).result()


def _run(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception:
        forget_failures()
        raise
