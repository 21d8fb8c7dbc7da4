"""What HTTP needs of a protocol, and what a protocol needs of the server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ..answering import Happenings
from ..answers import Answers
from ..engine.adapters import Adapters
from ..engine.sums import MOST, Weights, parse, weights
from ..models import Listed, Models
from .fields import Fields
from .problems import Problem
from .store import ResponseStore

MOST_IN_SUM = 16  # adapters


@dataclass(frozen=True)
class Service:
    """What is served. `secret` signs what clients bring back; `caching`: prompts are remembered.

    `store` has the responses that clients may go on from.
    """

    answers: Answers
    model: Models
    secret: bytes = b""
    caching: bool = False
    store: ResponseStore = field(default_factory=ResponseStore)
    adapters: Adapters | None = None

    @property
    def models(self) -> Models:
        """The model, with the adapters that are mounted now."""
        names = self.adapters.names if self.adapters else ()
        return replace(self.model, adapters=names)

    def name(self, body: Fields) -> str:
        """The true name of what a request asks for: a model, with an adapter or a sum of some."""
        return self.models.find(body.text("model"), _adapters(body))

    async def prepared(self, body: Fields) -> str:
        """The `name`; a sum of adapters is made here, so that the engine does not wait for it."""
        name = self.name(body)
        adapter = self.model.adapter_of(name)
        if adapter is not None and self.adapters is not None:
            await self.answers.preparer.prepare(partial(self.adapters.take, adapter))
        return name

    def fingerprint(self, true_name: str) -> str:
        """Of all that decides what is answered under a name that `models.find` has returned."""
        adapter = self.model.adapter_of(true_name)
        if adapter is None or self.adapters is None:
            return self.model.fingerprint
        return f"{self.model.fingerprint}_{self.adapters.take(adapter).digest[:12]}"


def _adapters(body: Fields) -> Weights | None:
    """Of the field `adapter`, or of `lora` as llama.cpp has it; None without them."""
    if "lora" not in body:
        adapter = body.text("adapter")
        return None if adapter is None else parse(adapter)
    if "adapter" in body:
        raise body.wrong("lora", "cannot be combined with 'adapter'")
    found = []
    for part in body.objects("lora", MOST_IN_SUM):
        part.required("id")
        found.append((part.text("id") or "", part.number("scale", 1.0, -MOST, MOST)))
    return weights(found)


class Reply(Protocol):
    """Answers on their way to a client, in the words of a protocol."""

    @property
    def stream(self) -> bool: ...
    @property
    def answering(self) -> Happenings: ...
    async def whole(self) -> dict[str, Any]:
        """The response, when all answers are complete."""
        ...

    def events(self) -> AsyncIterator[str]:
        """The response as server-sent events."""
        ...

    def error_event(self, problem: Problem, request_id: str) -> str:
        """Ends a stream that cannot be completed."""
        ...


class Endpoint(Protocol):
    """Reads a body and begins to answer, or has the answer at once."""

    async def __call__(
        self, service: Service, body: Fields, client: str
    ) -> Reply | dict[str, Any]: ...


class Dialect(Protocol):
    """How a protocol says what every protocol says."""

    @property
    def ping(self) -> str:
        """An event that says nothing but that the stream is alive."""
        ...

    def status(self, problem: Problem) -> int: ...
    def error(self, problem: Problem, request_id: str) -> Mapping[str, Any]: ...
    def models(self, listed: Sequence[Listed]) -> dict[str, Any]: ...
    def model(self, listed: Listed) -> dict[str, Any]: ...


def event(data: str, name: str | None = None) -> str:
    """A server-sent event; `data` has no line breaks."""
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


def named_event(value: Mapping[str, Any]) -> str:
    """An event that is called by the type of its value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return event(text, value["type"])
