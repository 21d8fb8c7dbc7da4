"""Sending: JSON, and events with pings between them, for as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from anyio import fail_after
from starlette.types import Message, Receive, Scope, Send

from .body import ClientGone

SEND_SECONDS = 60.0  # a client that reads nothing for so long is gone


async def unless_gone(work: asyncio.Task[None], receive: Receive) -> None:
    """Wait for the work, and cancel it where the client closes the connection."""
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait({work, gone})
    work.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def with_pings(events: AsyncIterator[str], ping: str, seconds: float) -> AsyncIterator[str]:
    """The events, and a ping whenever there is none for a while."""
    following: asyncio.Task[str] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({following}, timeout=seconds)
            if not done:
                yield ping
                continue
            try:
                text = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield text
    finally:
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait({following})


async def _next(events: AsyncIterator[str]) -> str:
    return await events.__anext__()


async def send_body(send: Send, body: bytes, *, more: bool) -> None:
    message = {"type": "http.response.body", "body": body, "more_body": more}
    try:
        with fail_after(SEND_SECONDS):
            await send(message)
    except TimeoutError:
        raise ClientGone from None


def start(status: int, kind: str, headers: dict[str, str]) -> Message:
    listed = {"content-type": kind, **headers}
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in listed.items()],
    }


async def send_json(
    value: Any, scope: Scope, send: Send, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    length = {"content-length": str(len(body))}
    await send(start(status, "application/json", {**length, **(headers or {})}))
    await send_body(send, b"" if scope["method"] == "HEAD" else body, more=False)
