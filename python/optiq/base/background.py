"""Work beside a server's engine, by a thread that gives way to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# A busy core gives such a thread half of what others get.
_NICE = 3

T = TypeVar("T")


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICE)


# One: MLX keeps something of each thread that has used it.
_thread = ThreadPoolExecutor(1, "optiq-background", _give_way)


def in_background(work: Callable[[], T]) -> T:
    """What `work` returns or raises, when what was given before it is over."""
    return _thread.submit(work).result()
