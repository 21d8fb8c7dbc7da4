"""Responses that are remembered, so that a client may go on from one by its id."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import Refusal

MOST_BYTES = 64 * 2**20
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """A response, and the items of its conversation: all input before it, and its own output."""

    response: Mapping[str, Any]
    items: tuple[Item, ...]
    nbytes: int


class ResponseStore:
    """The responses of one server, in one thread. Those that were not used for longest go first."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._by_item: dict[str, Item] = {}  # output items, which clients may refer to
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def keep(self, response: Mapping[str, Any], before: Sequence[Item]) -> None:
        """Remember a response to `before`, unless it alone is too large."""
        items = (*before, *response["output"])
        nbytes = len(json.dumps([response, items]))
        if nbytes > self._most:
            return
        self._stored[response["id"]] = Stored(response, items, nbytes)
        self._by_item |= {item["id"]: item for item in response["output"]}
        self._nbytes += nbytes
        while self._nbytes > self._most:
            self.delete(next(iter(self._stored)))

    def find(self, identity: str, status: int = 404) -> Stored:
        """Raises Refusal, with this status."""
        stored = self._stored.get(identity)
        if stored is None:
            raise Refusal(
                status,
                "previous_response_not_found",
                f"the response {identity[:100]!r} is not stored here; it was made with "
                "store=false, by another server or too long ago, so send the whole conversation",
            )
        self._stored.move_to_end(identity)
        return stored

    def item(self, identity: str) -> Item | None:
        return self._by_item.get(identity)

    def delete(self, identity: str) -> None:
        """Raises Refusal."""
        stored = self.find(identity)
        del self._stored[identity]
        self._nbytes -= stored.nbytes
        for item in stored.response["output"]:
            self._by_item.pop(item["id"], None)
