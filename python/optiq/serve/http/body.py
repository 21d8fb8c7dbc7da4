"""Reading the body of a request, within bounds of size and time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from anyio import fail_after
from starlette.types import Receive

from ...errors import OverloadedError
from ..options import Options
from ..protocols.problems import Refusal

BODIES = 8  # so many of the largest may be in memory at a time


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class Bodies:
    """Reads bodies, and knows how much memory the requests in hand take together."""

    def __init__(self, options: Options) -> None:
        self._most = options.body_bytes
        self._seconds = options.body_seconds
        self._room = BODIES * options.body_bytes

    @asynccontextmanager
    async def read(self, headers: Mapping[str, str], receive: Receive) -> AsyncIterator[bytes]:
        """The body, for as long as it is needed. Raises Refusal, OverloadedError, ClientGone."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(
                415,
                "unsupported_content_type",
                f"the content type is {kind[:100] or 'missing'!r}; send application/json",
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "unsupported_encoding", "the body is compressed; send it plain")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            try:
                with fail_after(self._seconds):
                    await self._receive(receive, parts)
            except TimeoutError:
                raise Refusal(
                    408,
                    "body_timeout",
                    f"the body did not arrive in {self._seconds:g} seconds; send it faster",
                ) from None
            yield b"".join(parts)
        finally:
            self._room += sum(map(len, parts))

    async def _receive(self, receive: Receive, parts: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._room -= len(parts[-1])
            if size > self._most:
                raise self._too_large()
            if self._room < 0:
                raise OverloadedError("too many large bodies at a time", 1)
            more = message.get("more_body", False)

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "request_too_large",
            f"the body is larger than {self._most} bytes, the limit of this server",
        )
