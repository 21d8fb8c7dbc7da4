"""The text of an answer as its tokens come: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are not yet a character


class AnswerText:
    """Turns tokens into text.

    Tokens are decoded in the company of those before them, as some tokenizers join words there. A
    character whose bytes are not all there is held back, and so is what may become a stop text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decode = tokenizer.decode
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._shown = self._read = 0  # tokens before these are in `_held`, or gone
        self._held = ""
        self.stopped: str | None = None  # the stop text that was found

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        new = self._new()
        if new.endswith(_BROKEN):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return self._passed(self._held + new)

    def end(self) -> str:
        """What was held back, after the last token."""
        if self.stopped is not None:
            return ""
        text = self._passed(self._held + self._new())
        self._shown = self._read = len(self._tokens)
        rest, self._held = self._held, ""
        return text + rest

    def _new(self) -> str:
        before = self._text(self._tokens[self._shown : self._read])
        return self._text(self._tokens[self._shown :])[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return str(self._decode(tokens, skip_special_tokens=False)) if tokens else ""

    def _passed(self, text: str) -> str:
        """`text` up to the first stop text, or without an end that may become one."""
        found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda f: (f[0], -len(f[1])))
            self._held = ""
            return text[:at]
        held = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
