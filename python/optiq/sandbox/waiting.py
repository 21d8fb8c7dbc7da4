"""Calls that wait, awaited: in a thread of their own, and cancelled with their task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from .call import Cancel
from .limits import OnOutput, Stream

T = TypeVar("T")


async def awaited(call: Callable[[OnOutput | None, Cancel], T], on_output: OnOutput | None) -> T:
    """The result of `call`, which gets what it tells of output and what ends it.

    `on_output` is called in the event loop's thread. Where the task is cancelled, so is the call,
    and what it started is gone before CancelledError goes on.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    cancel = Cancel()

    def tell(stream: Stream, text: str) -> None:
        loop.call_soon_threadsafe(hear, stream, text)

    def hear(stream: Stream, text: str) -> None:
        try:
            if on_output is not None and not done.done():
                on_output(stream, text)
        except Exception as error:
            cancel.cancel()
            failures.append(error)

    def run() -> None:
        try:
            result = call(tell if on_output else None, cancel)
        except BaseException as error:
            finish(done.set_exception, error)
        else:
            finish(done.set_result, result)

    def finish(settle: Callable[..., None], outcome: object) -> None:
        loop.call_soon_threadsafe(lambda: None if done.done() else settle(outcome))

    failures: list[Exception] = []
    threading.Thread(target=run, name="optiq-sandbox", daemon=True).start()
    try:
        result = await asyncio.shield(done)
    except asyncio.CancelledError:
        cancel.cancel()
        await asyncio.wait([done])
        raise
    if failures:
        raise failures[0]
    return result
