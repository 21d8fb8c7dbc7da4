"""Work that takes a processor for a while, away from the event loop and in limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from anyio import fail_after

from ..errors import DeadlineError, OverloadedError

THREADS = 2
MOST = 64  # requests that wait for a thread, or have one

T = TypeVar("T")


class Preparer:
    """A few threads for parsing, rendering and compiling. Belongs to one event loop."""

    def __init__(self, seconds: float) -> None:
        """Each piece of work may take so many seconds."""
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="optiq-prepare")
        self._in_pool = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, work: Callable[[], T]) -> T:
        """Raises what `work` raises, OverloadedError, DeadlineError."""
        if self._in_pool >= MOST:
            raise OverloadedError("too many requests are being prepared", 1)
        self._in_pool += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._let_go(loop))
        try:
            # asyncio.wait_for would lose a cancellation that comes with the result (Python 3.11).
            with fail_after(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise DeadlineError(
                f"the request could not be prepared in {self._seconds:g} seconds; "
                "send a shorter conversation or a simpler schema"
            ) from None

    def _let_go(self, loop: asyncio.AbstractEventLoop) -> None:
        def forget() -> None:
            self._in_pool -= 1

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(forget)
