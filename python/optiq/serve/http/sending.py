"""Sending: JSON, and events with pings between them, for as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
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


class Stream:
    """The body of a response whose parts come one by one, with a ping where none came for a while.

    A part costs no task and no timer: there may be hundreds in a second.
    """

    def __init__(self, send: Send, ping: str, seconds: float) -> None:
        self._send, self._ping, self._seconds = send, ping.encode(), seconds
        self._idle = True  # since the last look of the pinger
        self._pinger = asyncio.create_task(self._keep_pinging())

    async def write(self, text: str) -> None:
        self._idle = False
        await send_body(self._send, text.encode(), more=True)
        await asyncio.sleep(0)  # neither may have waited, and it may be time to stop

    async def _keep_pinging(self) -> None:
        with suppress(ClientGone):
            while True:
                self._idle = True
                await asyncio.sleep(self._seconds)
                if self._idle:
                    await send_body(self._send, self._ping, more=True)

    async def close(self) -> None:
        self._pinger.cancel()
        await asyncio.wait({self._pinger})


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
