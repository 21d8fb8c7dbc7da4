"""A conversation with a model in this process, turn by turn, without HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ...chat.parts import CallArguments, CallEnd, CallStart, Reasoning, Text
from ..answering import End, Happening, Progress, Step
from ..answers import Answers
from ..asked import Chat, Interpreter, Thinking, Wishes
from ..engine.request import Sampling
from ..runs import Ran, Running
from ..tools.python import TOOL
from ..tools.rounds import turns
from ..usage import Usage
from .screen import Screen


@dataclass(frozen=True)
class Settings:
    """How answers are made. `thinking` None leaves it to the model. `adapter` is one that is
    mounted, by its name."""

    system: str = ""
    python: bool = False
    thinking: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    adapter: str | None = None


@dataclass
class _Round:
    """What the model has said since the last program."""

    text: str = ""
    reasoning: str = ""
    run: str = ""  # the program that runs
    seconds: float = 0.0
    tokens: int = 0


class Talk:
    """The messages so far, and what asks for the next one. Belongs to the loop of `answers`."""

    def __init__(self, answers: Answers, screen: Screen, settings: Settings) -> None:
        self._answers, self._screen = answers, screen
        self.settings = settings
        self.messages: list[Mapping[str, Any]] = []
        self.reasoning = ""  # of the last answer
        self._containers: list[str] = []

    async def answer(self, said: str) -> None:
        """One turn. Cancelled, it keeps what the model has said so far, or drops the question
        if that is nothing. Raises ServeError."""
        start = len(self.messages)
        self.messages.append({"role": "user", "content": said})
        self.reasoning = ""
        now = _Round()
        try:
            await self._ask(now)
        except BaseException:
            if now.text.strip():
                self._add(now)
            elif len(self.messages) == start + 1:
                del self.messages[start:]
            raise
        finally:
            self._screen.end_turn()

    async def _ask(self, now: _Round) -> None:
        chat = self._chat()
        settings = self.settings
        wishes = Wishes(settings.max_tokens, settings.sampling, adapter=settings.adapter)
        began = perf_counter()
        async with await self._answers.chat(chat, wishes) as answering:
            self._screen.reading()
            async for _, event in answering:
                self._hear(now, event)
                if isinstance(event, Step):
                    began = began if now.tokens else perf_counter()
                    now.tokens += len(event.tokens)
                if isinstance(event, End):
                    self._add(now)
                    answering.said(0, event, self.messages[-1])
                    usage = answering.usage
                    self._screen.turn_took(
                        usage, _rate(usage, perf_counter() - began), event.reason
                    )

    def _chat(self) -> Chat:
        settings = self.settings
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        return Chat(
            messages=(*system, *self.messages),
            tools=(TOOL,) if settings.python else (),
            thinking=Thinking(settings.thinking),
            interpreter=Interpreter(seen=tuple(self._containers)) if settings.python else None,
        )

    def _hear(self, now: _Round, event: Happening) -> None:
        if isinstance(event, Progress):
            return
        if isinstance(event, Running):
            now.run = event.code
            self._screen.program(event.code)
        elif isinstance(event, Ran):
            self.messages += turns(now.text, now.reasoning, [(event.id, event.code, event.text)])
            self._containers.append(event.container)
            now.text = now.reasoning = ""
            self._screen.program_ended(event)
        else:
            for part in event.parts:
                if isinstance(part, Text):
                    now.text += part.text
                    self._screen.text(part.text)
                elif isinstance(part, Reasoning):
                    now.reasoning += part.text
                    self.reasoning += part.text
                    self._screen.reasoning(part.text)
                else:
                    assert isinstance(part, CallStart | CallArguments | CallEnd)

    def _add(self, now: _Round) -> None:
        message = {"role": "assistant", "content": now.text}
        if now.reasoning:
            message["reasoning_content"] = now.reasoning
        self.messages.append(message)

    def forget(self) -> None:
        self.messages.clear()
        self._containers.clear()
        self.reasoning = ""

    def change(self, **settings: Any) -> None:
        self.settings = replace(self.settings, **settings)

    def save(self, file: Path) -> None:
        """The messages in OpenAI's shape. Raises OSError."""
        system = [{"role": "system", "content": self.settings.system}]
        messages = [*(system if self.settings.system else []), *self.messages]
        file.write_text(json.dumps(messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _rate(usage: Usage, seconds: float) -> float:
    """Tokens per second after the first one."""
    return (usage.generated - 1) / seconds if usage.generated > 1 and seconds > 0 else 0.0


@contextmanager
def interruptible(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> Iterator[None]:
    """Ctrl-C cancels the task, and nothing else."""
    import signal

    try:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    except (NotImplementedError, RuntimeError, ValueError):  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
