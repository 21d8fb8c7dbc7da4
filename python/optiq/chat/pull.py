"""A text that arrives in pieces, for parsers that are written as if it were all there.

A parser is a generator: it asks for more text with `yield from`, and so may stop anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import cache

import regex

from .any_of import any_of

# Headers of calls and the like are short; longer text is not a header and is not looked at again.
LONGEST = 1000

Wait = Generator[None, str | None, None]


class Ended(Exception):
    """No more text comes."""


class Pull:
    """Holds the text that is not taken yet; `taken` collects what is."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self.taken: list[str] = []

    def more(self) -> Wait:
        piece = None if self._ended else (yield)
        if piece is None:
            self._ended = True
            raise Ended
        self._text = self._text[self._at :] + piece
        self._at = 0

    def take(self, length: int) -> str:
        text = self._text[self._at : self._at + length]
        self._at += length
        self.taken.append(text)
        return text

    def rest(self) -> str:
        return self.take(len(self._text) - self._at)

    def until(
        self, marks: Sequence[str], put: Callable[[str], None]
    ) -> Generator[None, str | None, str]:
        """Pass on what stands before the next of `marks`; that mark, which is not taken."""
        find = any_of(marks)
        while True:
            found = find.search(self._text, self._at)
            stop = found.start() if found else len(self._text) - self._begun(marks)
            if stop > self._at:
                put(self.take(stop - self._at))
            if found:
                return found[0]
            try:
                yield from self.more()
            except Ended:
                if rest := self.rest():
                    put(rest)
                raise

    def _begun(self, marks: Sequence[str]) -> int:
        """How many characters at the end may be the beginning of a mark."""
        longest = min(len(self._text) - self._at, max(map(len, marks), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(mark.startswith(self._text[-length:]) for mark in marks):
                return length
        return 0

    def match(self, pattern: str) -> Generator[None, str | None, regex.Match[str] | None]:
        """What `pattern` matches of the text that follows, which is not taken.

        `pattern` must not match more when more text comes: its last character is not repeated.
        """
        compiled = _compiled(pattern)
        while True:
            found = compiled.match(self._text, self._at, partial=True)
            if found is None or (len(self._text) - self._at > LONGEST and found.partial):
                return None
            if not found.partial:
                return found
            try:
                yield from self.more()
            except Ended:
                return None

    def span(self, end: Callable[[str, int], int | None], put: Callable[[str], None]) -> Wait:
        """Take text up to where `end` (as `JsonSpan.end`) finds its end."""
        while (stop := end(self._text, self._at)) is None:
            if rest := self.rest():
                put(rest)
            yield from self.more()
        put(self.take(stop - self._at))


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
