"""Calls in an answer, read while they are written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import regex

from .calls import Call, Unreadable
from .json_span import JsonSpan
from .notation import JsonCalls, TaggedCalls
from .parser import json_calls
from .parts import CallArguments, CallEnd, CallStart, Part
from .pull import Ended, Pull, Wait

# A call as one JSON object, up to its arguments, in the order that templates ask for.
_HEAD = (
    r"\{\s*(?:\"(?:type|id)\"\s*:\s*\"[^\"\\]*\"\s*,\s*)*"
    r"\"(?:name|function)\"\s*:\s*\"(?P<name>[^\"\\]+)\"\s*,\s*"
    r"\"(?:arguments|parameters)\"\s*:\s*(?=\{)"
)
# How much of the end of a call is looked at.
_TAIL = 200


class CallReader:
    """Reads calls from `pull`, gives their parts to `emit`, and calls `done` after each.

    `index` is that of the next call.
    """

    def __init__(
        self,
        pull: Pull,
        tools: Sequence[Mapping[str, Any]],
        emit: Callable[[Part], None],
        done: Callable[[], None],
    ) -> None:
        self.index = 0
        self._pull = pull
        self._tools = list(tools)
        self._names = {tool.get("function", {}).get("name") for tool in tools}
        self._emit = emit
        self._done = done

    def read(self, form: JsonCalls | TaggedCalls, *, known: bool, name: str | None = None) -> Wait:
        """The calls of a section whose start is taken; Unreadable at anything else.

        `known`: only calls of the tools are calls. `name`: the function, where the JSON that
        follows has only its arguments.
        """
        if isinstance(form, TaggedCalls):
            return self._tagged(form, known)
        return self._json(form, known, name)

    def _json(self, form: JsonCalls, known: bool, name: str | None) -> Wait:
        opening = yield from self._pull.match(form.opening)
        if opening is None:
            raise Unreadable("not the beginning of a call")
        while opening:
            self._pull.take(len(opening[0]))
            if function := name or opening.groupdict().get("name"):
                yield from self._arguments(self._known(function, known))
                self._end()
            else:
                yield from self._object(known, bare=not form.start)
            if name:
                return
            if form.close:
                yield from self._skip(rf"\s*(?:```)?\s*{regex.escape(form.close)}")
            if form.end and (yield from self._skip(rf"[\s\],;]*{regex.escape(form.end)}")):
                return
            opening = yield from self._pull.match(form.opening)
        yield from self._skip(r"[\s,;]*\]")

    def _skip(self, pattern: str) -> Generator[None, str | None, bool]:
        found = yield from self._pull.match(pattern)
        if found:
            self._pull.take(len(found[0]))
        return found is not None

    def _object(self, known: bool, bare: bool) -> Wait:
        """A call as one JSON object."""
        text: list[str] = []
        head = yield from self._pull.match(_HEAD)
        if head:
            text.append(self._pull.take(len(head[0])))
            text += yield from self._arguments(self._known(head["name"], known or bare))
            tail = yield from self._pull.match(r"\s*[},]")
            if tail is None:
                raise Unreadable("the call does not end")
            text.append(self._pull.take(len(tail[0])))
            if tail[0].endswith(","):
                rest = JsonSpan()
                rest.end("{", 0)
                yield from self._pull.span(rest.end, text.append)
            _loads("".join(text))
            self._end()
        elif bare:
            raise Unreadable("JSON, but not a call")
        else:
            yield from self._pull.span(JsonSpan().end, text.append)
            for call in json_calls(_loads("".join(text))):
                self._whole(call, known)

    def _arguments(self, name: str) -> Generator[None, str | None, list[str]]:
        """The JSON object that follows, passed on as it comes; its text."""
        index = self.index
        text: list[str] = []

        def put(piece: str) -> None:
            text.append(piece)
            self._emit(CallArguments(index, piece))

        self.index += 1
        self._emit(CallStart(index, name))
        yield from self._pull.span(JsonSpan().end, put)
        if not isinstance(_loads("".join(text)), dict):
            raise Unreadable("the arguments are not an object")
        return text

    def _tagged(self, form: TaggedCalls, known: bool) -> Wait:
        if (yield from self._pull.match(form.opening)) is None:
            raise Unreadable("not the beginning of a call")
        body: list[str] = []
        while True:
            try:
                yield from self._pull.until([form.end], body.append)
            except Ended:
                if not _closed(form, body):
                    raise
                break
            mark = self._pull.take(len(form.end))
            if _closed(form, body):
                break
            body.append(mark)
        text = "".join(body)
        if bare := regex.fullmatch(form.bare, text):
            self._whole(Call(bare["name"], {}), known)
            return
        if not form.sound(text):
            raise Unreadable("the call is not whole")
        # Each parser has its own way to fail on what a model writes; those that use Python's warn.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls = json_calls(form.read(text, self._tools))
        except Exception as error:
            raise Unreadable(str(error)) from None
        for call in calls:
            self._whole(call, known)

    def _whole(self, call: Call, known: bool) -> None:
        text = _dumps(call.arguments)
        self._emit(CallStart(self.index, self._known(call.name, known)))
        self._emit(CallArguments(self.index, text))
        self.index += 1
        self._end()

    def _end(self) -> None:
        self._emit(CallEnd(self.index - 1))
        self._done()

    def _known(self, name: str, known: bool) -> str:
        if known and name not in self._names:
            raise Unreadable(f"{name} is not a tool")
        return name


def _closed(form: TaggedCalls, body: Sequence[str]) -> bool:
    """Whether `end` after `body` ends the call."""
    tail, size = "", 0
    for piece in reversed(body):
        tail, size = piece[-_TAIL:] + tail, size + len(piece)
        if size >= _TAIL:
            break
    if tail.rstrip().endswith(form.closing):
        return True
    return size < _TAIL and regex.fullmatch(form.bare, tail) is not None


def _loads(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise Unreadable(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None


def _dumps(arguments: Mapping[str, Any]) -> str:
    """As JSON; Unreadable for the sets, bytes and infinities that Python's notation may hold."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        with suppress(UnicodeEncodeError):
            text.encode()
            return text
        return json.dumps(arguments)  # half a surrogate pair
    except (TypeError, ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None
