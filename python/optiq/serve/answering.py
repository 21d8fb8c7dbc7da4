"""The answers to one request while they are made.

The engine's events come from its own thread. They are handed to the event loop, where each answer
has a reader that tells text, reasoning and calls apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Protocol

from ..chat.parts import CallEnd, Part, Reasoning, Text
from ..errors import OverloadedError
from .courier import Courier
from .engine.request import Event, Failed, Finished, Guide, Piece, Reading, Request, Token
from .metrics import Metrics
from .runs import Ran, Running
from .usage import Usage

Heard = tuple[int, Event, float]  # choice, what happened to it, perf_counter()


class Engine(Protocol):
    """What the server needs of serve.engine."""

    @property
    def context(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def fault(self) -> str: ...
    def start(self) -> None: ...
    def close(self, drain: float = 0) -> None: ...
    def stats(self) -> Any: ...
    def submit(self, request: Request, listener: Callable[[Event], None]) -> int: ...
    def cancel(self, ticket: int) -> None: ...


class Parts(Protocol):
    """A reader of answers, as chat.reader has it."""

    def feed(self, text: str) -> Sequence[Part]: ...
    def end(self) -> Sequence[Part]: ...


class PlainText:
    """A reader that finds text and nothing else."""

    def feed(self, text: str) -> Sequence[Part]:
        return [Text(text)] if text else []

    def end(self) -> Sequence[Part]:
        return []


@dataclass(frozen=True)
class Progress:
    """The prompt is being read; `cached` of its tokens did not have to be."""

    cached: int


@dataclass(frozen=True)
class Step:
    """What an answer goes on with. The parts may lag behind the tokens."""

    parts: tuple[Part, ...]
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class End:
    """An answer is complete; `parts` are what its reader still held.

    `stop` is the text that ended it where `reason` is "stop_text".
    """

    parts: tuple[Part, ...]
    reason: Literal["stop", "stop_text", "length", "calls"]
    usage: Usage
    stop: str | None = None


Happening = Progress | Step | End | Running | Ran


class Happenings(Protocol):
    """What replies need of an answer: `Answering` itself, or the rounds of one with a tool."""

    n: int

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]: ...
    @property
    def boundaries(self) -> Sequence[int]: ...
    @property
    def usage(self) -> Usage: ...
    @property
    def first_token(self) -> float | None: ...
    def said(self, index: int, end: End, message: Mapping[str, Any]) -> None: ...
    async def __aenter__(self) -> Happenings: ...
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def __aiter__(self) -> AsyncIterator[tuple[int, Happening]]: ...


@dataclass
class _Choice:
    """An answer in the making."""

    prompt: int  # which of the prompts it answers
    reader: Parts
    ticket: int | None = None
    started: float = 0.0
    last: float | None = None
    pending: int = 0  # tokens since the last part
    reasoning: int = 0
    calls: int = 0
    tokens: list[int] = field(default_factory=list)

    def note(self, parts: Sequence[Part], tokens: int) -> None:
        self.pending += tokens
        self.calls += sum(isinstance(part, CallEnd) for part in parts)
        if parts:
            self.reasoning += self.pending if isinstance(parts[0], Reasoning) else 0
            self.pending = 0


class Answering:
    """The answers to one request, as an asynchronous iterator of (choice, event).

    Choices are numbered prompt by prompt. Leaving the context cancels what is not complete. An
    answer that fails raises its error, and ends the others.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        requests: Sequence[Request],
        readers: Sequence[Callable[[], Parts]],
        guide: Callable[[], Guide] | None,
        n: int,
        courier: Courier[Heard],
    ) -> None:
        self._engine, self._metrics, self._courier = engine, metrics, courier
        self._queue: asyncio.Queue[Heard] = asyncio.Queue()
        self._choices: list[_Choice] = []
        self._open = len(requests) * n
        self.prompts = [request.tokens for request in requests]
        self.boundaries = requests[0].boundaries
        self.n = n
        self.usage = Usage(prompt=sum(len(request.tokens) for request in requests))
        self.first_token: float | None = None  # seconds
        self.remember: Callable[[Mapping[str, Any], tuple[int, ...]], None] | None = None
        try:
            for prompt, (request, reader) in enumerate(zip(requests, readers, strict=True)):
                for i in range(n):
                    self._submit(_Choice(prompt, reader()), _nth(request, i, guide))
        except BaseException:
            self.cancel()
            raise

    def _submit(self, choice: _Choice, request: Request) -> None:
        index = len(self._choices)
        choice.started = perf_counter()
        self._choices.append(choice)
        choice.ticket = self._engine.submit(request, partial(self._heard, index))

    def _heard(self, index: int, event: Event) -> None:
        """In the engine's thread."""
        self._courier.send(self._queue, (index, event, perf_counter()))

    def cancel(self) -> None:
        for choice in self._choices:
            if choice.ticket is not None:
                self._engine.cancel(choice.ticket)
                choice.ticket = None

    def said(self, index: int, end: End, message: Mapping[str, Any]) -> None:
        """A choice has ended, and `message` is how it will be read when the client sends it back.

        A text that ends an answer is not part of the message, though the model has said it.
        """
        if self.remember is not None and end.reason != "stop_text":
            choice = self._choices[index]
            self.remember(message, (*self.prompts[choice.prompt], *choice.tokens))

    async def __aenter__(self) -> Answering:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> tuple[int, Progress | Step | End]:
        while self._open:
            index, event, now = await self._queue.get()
            found = self._read(self._choices[index], event, now)
            if isinstance(found, End):
                self._open -= 1
            if found is not None:
                return index, found
        raise StopAsyncIteration

    def _read(self, choice: _Choice, event: Event, now: float) -> Progress | Step | End | None:
        if isinstance(event, Reading):
            return Progress(event.cached)
        if isinstance(event, Piece):
            if event.tokens:
                self._time(choice, now)
                choice.tokens += [token.id for token in event.tokens]
            parts = choice.reader.feed(event.text)
            choice.note(parts, len(event.tokens))
            return Step(tuple(parts), event.tokens) if parts or event.tokens else None
        choice.ticket = None
        if isinstance(event, Failed):
            raise event.error
        return self._finish(choice, event)

    def _finish(self, choice: _Choice, event: Finished) -> End:
        parts = choice.reader.end()
        choice.note(parts, 0)
        if event.reason == "cancelled":
            raise OverloadedError("the answer was cancelled by the server", 1)
        reason: Any = event.reason
        if choice.calls and reason == "stop":
            reason = "calls"
        first = choice is next(c for c in self._choices if c.prompt == choice.prompt)
        usage = Usage(
            0,
            event.cached_tokens if first else 0,
            event.generated_tokens,
            min(choice.reasoning, event.generated_tokens),
        )
        self.usage += usage
        self._metrics.answered(reason, len(self.prompts[choice.prompt]) if first else 0, usage)
        return End(tuple(parts), reason, replace(usage, prompt=event.prompt_tokens), event.stop)

    def _time(self, choice: _Choice, now: float) -> None:
        if choice.last is None:
            self._metrics.first_token.observe(now - choice.started)
            self.first_token = self.first_token or now - choice.started
        else:
            self._metrics.between_tokens.observe(now - choice.last)
        choice.last = now


def _nth(request: Request, i: int, guide: Callable[[], Guide] | None) -> Request:
    """The i-th of several answers: a guide of its own, and a seed of its own."""
    sampling = request.sampling
    if sampling.seed is not None and i:
        sampling = replace(sampling, seed=sampling.seed + i)
    return replace(request, sampling=sampling, guide=guide() if guide else None)
