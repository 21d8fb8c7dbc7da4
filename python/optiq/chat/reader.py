"""An answer, read while it is written: its text, its reasoning and its calls.

The pieces may be cut anywhere. What cannot be decided yet is held back, and no more than that.

- What turns out not to be a readable call is passed on as text, with its marks.
- Reasoning that is closed is reasoning, whatever stands in it. Calls in reasoning that never ends
  are calls, if they name one of the tools: models forget to close it. They come at the end.
- White space around reasoning and calls is not passed on.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import regex

from .call_reader import CallReader
from .calls import Unreadable
from .notation import Channels, JsonCalls, Notation, TaggedCalls
from .parts import CallArguments, CallEnd, CallStart, Part, Reasoning, Text
from .pull import Ended, Pull, Wait

__all__ = ["CallArguments", "CallEnd", "CallStart", "Part", "Reader", "Reasoning", "Text"]

# The body of a message to a function: its arguments.
_BODY = JsonCalls("", r"\s*(?=\{)")


@dataclass
class _Open:
    """Reasoning that may never end: what came in it since its first readable call.

    `held` has texts, each with the parts that it is if the reasoning never ends; None: it is text.
    """

    index: int
    held: list[tuple[str, list[Part] | None]] = field(default_factory=list)
    call: list[Part] = field(default_factory=list)


class Reader:
    """Reads one answer. `calls` is how many calls of it are complete.

    `tools` (OpenAI's shape) give untyped notations the types of values. `reasoning` says that the
    prompt has opened the reasoning (`Prompt.reasoning`). Without `calls` calls are text.
    """

    def __init__(
        self,
        notation: Notation,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        reasoning: bool = False,
        calls: bool = True,
    ) -> None:
        self.calls = 0
        self._channels = notation.channels
        self._span = notation.reasoning
        self._dropped = notation.dropped
        self._marked = {form.start: form for form in notation.calls if calls and form.start}
        self._unmarked = [form for form in notation.calls if calls and not form.start]
        self._recipient = self._channels.recipient if self._channels and calls else None
        self._pull = Pull()
        self._reader = CallReader(self._pull, tools, self._emit, self._done)
        self._parts: list[Part] = []
        self._open: _Open | None = None
        self._kind: type[Text] | type[Reasoning] = Text
        self._space: list[str] = []  # passed on once more of this kind comes
        self._fresh = False  # a block has just ended
        self._run = self._answer(reasoning)
        next(self._run)

    def feed(self, text: str) -> list[Part]:
        """What `text` adds."""
        if text:
            self._run.send(text)
        return self._new()

    def end(self) -> list[Part]:
        """What was held back. Nothing may be fed after it."""
        with suppress(StopIteration):
            self._run.send(None)
        return self._new()

    def _new(self) -> list[Part]:
        parts = self._parts.copy()
        self._parts.clear()
        self.calls += sum(isinstance(part, CallEnd) for part in parts)
        return parts

    def _answer(self, reasoning: bool) -> Wait:
        with suppress(Ended):
            if self._channels:
                yield from self._messages(self._channels)
            if reasoning:
                yield from self._reasoning()
            yield from self._text(())
        if self._kind is Text and not self._fresh and (space := "".join(self._space)):
            self._parts.append(Text(space))

    def _text(self, ends: Sequence[str]) -> Generator[None, str | None, str]:
        """Text and calls, up to one of `ends`, which is not taken."""
        calls = self._marked if self._kind is Text else {}
        begin = [self._span.start] if self._span else []
        marks = [*ends, *calls, *self._dropped, *begin]
        yield from self._bare_calls()
        while True:
            mark = yield from self._pull.until(marks, self._say)
            if mark in ends:
                return mark
            self._pull.taken.clear()
            self._pull.take(len(mark))
            if mark in calls:
                yield from self._calls(calls[mark])
            elif mark in begin:
                yield from self._reasoning()
                yield from self._bare_calls()

    def _bare_calls(self) -> Wait:
        """Calls without a mark, which stand at the beginning of the text only."""
        for form in self._unmarked:
            self._pull.taken.clear()
            yield from self._calls(form)

    def _reasoning(self) -> Wait:
        """Reasoning, up to and with its end."""
        if self._span is None:
            return
        self._turn(Reasoning)
        self._open = _Open(self._reader.index)
        marks = [self._span.end, *self._marked]
        try:
            while (mark := (yield from self._pull.until(marks, self._say))) != self._span.end:
                self._pull.taken.clear()
                self._pull.take(len(mark))
                yield from self._calls(self._marked[mark])
        except Ended:
            held, self._open = self._open.held, None
            for text, parts in held:
                if parts is None:
                    self._say(text)
                self._parts += parts or []
            raise
        self._pull.take(len(mark))
        held, self._reader.index, self._open = self._open.held, self._open.index, None
        for text, _ in held:
            self._say(text)
        self._turn(Text)

    def _messages(self, channels: Channels) -> Wait:
        """An answer in channels."""
        while True:
            self._pull.taken.clear()
            begin = yield from self._pull.match(channels.begins)
            if begin or self._kind is Reasoning:
                self._turn(Text)
            if begin:
                yield from self._message(channels, self._pull.take(len(begin[0])))
            mark = yield from self._text([*channels.ends, *channels.starts])
            if mark in channels.ends:
                self._pull.take(len(mark))

    def _message(self, channels: Channels, begin: str) -> Wait:
        """The header of a message, and the message if it is a call."""
        header = [begin]
        try:
            yield from self._pull.until([channels.body], header.append)
        except Ended:
            self._say("".join(header))
            raise
        self._pull.take(len(channels.body))
        text = "".join(header)
        channel = regex.search(channels.channel, text)
        if self._recipient and (call := regex.search(self._recipient, text)):
            yield from self._calls(_BODY, call["name"])
        elif channel and channel[1] == channels.reasoning:
            self._turn(Reasoning)

    def _calls(self, form: JsonCalls | TaggedCalls, name: str | None = None) -> Wait:
        """Calls, of which the text taken since `taken` was cleared is the beginning."""
        open = self._open
        try:
            yield from self._reader.read(form, known=open is not None, name=name)
        except Unreadable:
            self._undo()
        except Ended:
            self._undo()
            raise
        if open and (rest := "".join(self._pull.taken)):
            open.held.append((rest, []))

    def _undo(self) -> None:
        """What was taken for a call is text, or reasoning."""
        if self._open:
            self._reader.index -= sum(isinstance(part, CallStart) for part in self._open.call)
            self._open.call = []
        self._say("".join(self._pull.taken))
        self._pull.taken.clear()

    def _done(self) -> None:
        """A call is complete."""
        if self._open:
            self._open.held.append(("".join(self._pull.taken), self._open.call))
            self._open.call = []
        else:
            self._space.clear()
            self._fresh = True
        self._pull.taken.clear()

    def _emit(self, part: Part) -> None:
        (self._open.call if self._open else self._parts).append(part)

    def _turn(self, kind: type[Text] | type[Reasoning]) -> None:
        """A block of this kind begins."""
        self._kind, self._fresh = kind, True
        self._space.clear()

    def _say(self, text: str) -> None:
        """Pass on text of this kind, white space only between other text."""
        if self._open and self._open.held:
            self._open.held.append((text, None))
            return
        said = text.strip()
        if not said:
            self._space.append(text)
            return
        end = len(text.rstrip())
        space = "".join(self._space) + text[: end - len(said)]
        if self._fresh:
            space = space.rpartition("\n")[2]
        self._parts.append(self._kind(space + said))
        self._space = [text[end:]]
        self._fresh = False
