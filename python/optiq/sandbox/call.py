"""What a caller may say about one run or snippet, and how another thread ends it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from .limits import Limits, OnOutput

CANCELLED = "cancelled by the caller"


class Stoppable(Protocol):
    """Looks at `cancelled` while it waits."""

    cancelled: str


class Cancel:
    """Ends the runs and snippets it is given to, now and later; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[Stoppable] = set()
        self._done = False

    def cancel(self) -> None:
        with self._lock:
            self._done = True
            for child in self._children:
                child.cancelled = CANCELLED

    @contextlib.contextmanager
    def attached(self, child: Stoppable) -> Iterator[None]:
        with self._lock:
            self._children.add(child)
            if self._done:
                child.cancelled = CANCELLED
        try:
            yield
        finally:
            with self._lock:
                self._children.discard(child)


@dataclass(frozen=True)
class Call:
    """Limits in place of the sandbox's, where output goes meanwhile, what may end it."""

    limits: Limits | None = None
    on_output: OnOutput | None = None
    cancel: Cancel = field(default_factory=Cancel)
