"""Events from the engine's thread to the event loop, all of a step in one wake-up."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Courier(Generic[T]):
    """Puts items into queues of an event loop, from any thread and in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[T], T]] = deque()
        self._called = False

    def send(self, queue: asyncio.Queue[T], item: T) -> None:
        self._items.append((queue, item))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed, so nobody waits for this
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # what is sent from now on calls again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
