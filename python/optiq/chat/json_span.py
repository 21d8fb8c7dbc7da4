"""Where a JSON value ends, in a text that arrives in pieces."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class JsonSpan:
    """Follows one object, array or string; whether it is valid JSON is for a parser to say."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside = False  # a string
        self._escaped = False

    def end(self, text: str, at: int) -> int | None:
        """One past the value's last character in `text`, of which `at` is where the last call
        ended; None if it is not there yet. Each character is looked at once."""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._inside else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at, mark = found.end(), found[0]
            if mark == "\\":
                self._escaped = True
            elif mark == '"':
                self._inside = not self._inside
            else:
                self._depth += 1 if mark in "{[" else -1
            if self._depth <= 0 and not self._inside and not self._escaped:
                return at
        return None
