"""An answer in rounds: the model calls the server's Python, reads what came of it, and goes on."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from ...chat.parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from ...errors import TooLongError
from ..answering import Answering, End, Happening, Progress, Step
from ..asked import Chat, Wishes
from ..runs import Running
from ..usage import Usage
from .python import CODE, NAME, Python

Begin = Callable[[Chat, Wishes], Awaitable[Answering]]


@dataclass
class _Said:
    """What the model has said in one round, and which of its parts the client sees."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, tuple[str, str]] = field(default_factory=dict)  # name, arguments
    complete: list[int] = field(default_factory=list)

    def add(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        shown = []
        for part in parts:
            if isinstance(part, Text):
                self.text += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            else:
                self._add_call(part)
                if self.calls[part.index][0] == NAME:
                    continue
                ours = sum(name == NAME for i, (name, _) in self.calls.items() if i < part.index)
                part = replace(part, index=part.index - ours)
            shown.append(part)
        return tuple(shown)

    def _add_call(self, part: CallStart | CallArguments | CallEnd) -> None:
        if isinstance(part, CallStart):
            self.calls[part.index] = (part.name, "")
        elif isinstance(part, CallArguments):
            name, arguments = self.calls[part.index]
            self.calls[part.index] = (name, arguments + part.text)
        else:
            self.complete.append(part.index)

    @property
    def programs(self) -> list[str]:
        """Of complete calls of ours."""
        calls = [self.calls[i] for i in self.complete if self.calls[i][0] == NAME]
        return [str(json.loads(arguments).get(CODE, "")) for _, arguments in calls]

    @property
    def others(self) -> bool:
        """Whether there are calls for the client."""
        return any(self.calls[i][0] != NAME for i in self.complete)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        message["tool_calls"] = [
            call(str(i), self.calls[i][0], json.loads(self.calls[i][1])) for i in self.complete
        ]
        return message


def call(identity: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call in a message."""
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(identity: str, text: str) -> dict[str, Any]:
    """What the model is told of a program, as a message."""
    return {"role": "tool", "tool_call_id": identity, "name": NAME, "content": text}


def turns(
    text: str, reasoning: str | None, runs: Sequence[tuple[str, str, str]]
) -> list[dict[str, Any]]:
    """An assistant's message that calls Python, and the results; `runs` are (id, code, told)."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    message["tool_calls"] = [call(identity, NAME, {CODE: code}) for identity, code, _ in runs]
    return [message, *(result(identity, told) for identity, _, told in runs)]


class Rounds:
    """The rounds of one answer, in the shape of an `Answering`, with `Running` and `Ran` between.

    After `interpreter.most_calls` programs the model has to answer without.
    """

    n = 1

    def __init__(
        self,
        begin: Begin,
        python: Python,
        container: str,
        chat: Chat,
        wishes: Wishes,
        first: Answering,
    ) -> None:
        assert chat.interpreter is not None
        self._begin, self._python, self._container = begin, python, container
        self._chat, self._wishes = chat, wishes
        self._left = chat.interpreter.most_calls
        self._now, self._before = first, Usage()
        self._events = self._rounds()

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return self._now.prompts

    @property
    def boundaries(self) -> tuple[int, ...]:
        return self._now.boundaries

    @property
    def usage(self) -> Usage:
        """Of all rounds so far."""
        return self._before + self._now.usage

    @property
    def first_token(self) -> float | None:
        return self._now.first_token

    def said(self, index: int, end: End, message: Mapping[str, Any]) -> None:
        self._now.said(index, end, message)

    def cancel(self) -> None:
        self._now.cancel()

    async def __aenter__(self) -> Rounds:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
        await self._events.aclose()

    def __aiter__(self) -> Rounds:
        return self

    async def __anext__(self) -> tuple[int, Happening]:
        return 0, await anext(self._events)

    async def _rounds(self) -> AsyncGenerator[Happening, None]:
        while True:
            said, end = _Said(), None
            async for _, event in self._now:
                if isinstance(event, Progress):
                    if self._before == Usage():
                        yield event
                    continue
                assert isinstance(event, Step | End)
                shown = said.add(event.parts)
                if isinstance(event, End):
                    end = replace(event, parts=shown)
                elif shown or event.tokens:
                    yield replace(event, parts=shown)
            assert end is not None
            programs = said.programs
            if not programs:
                yield replace(end, usage=self._before + end.usage)
                return
            if end.parts:
                yield Step(end.parts, ())
            message, results = said.message(), []
            self._now.said(0, end, message)
            for number, code in enumerate(programs):
                identity = f"ci_{secrets.token_hex(16)}"
                yield Running(identity, self._container, code)
                ran = await self._python.run(identity, self._container, code)
                yield ran
                results.append(result(str(number), ran.text))
            if said.others or end.reason == "length":
                yield replace(end, parts=(), usage=self._before + end.usage)
                return
            try:
                await self._go_on(message, results, end.usage)
            except TooLongError:  # what the programs have said does not fit
                yield replace(end, parts=(), reason="length", usage=self._before)
                return

    async def _go_on(
        self, message: Mapping[str, Any], results: Sequence[Mapping[str, Any]], usage: Usage
    ) -> None:
        self._before += usage
        self._left -= len(results)
        if self._wishes.max_tokens is not None:
            left = max(1, self._wishes.max_tokens - usage.generated)
            self._wishes = replace(self._wishes, max_tokens=left)
        self._chat = replace(
            self._chat,
            messages=(*self._chat.messages, message, *results),
            tool_choice="auto" if self._left > 0 else "none",
        )
        self._now = await self._begin(self._chat, self._wishes)
