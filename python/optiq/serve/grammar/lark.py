"""Rules of llguidance's Lark grammars.

A mark of a notation is a token of its own in one tokenizer and plain text in another. Text in a
grammar never matches a special token, so a grammar has to say which it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...chat.any_of import any_of

ANY = "/(?s:.*)/"
SOME = "/(?s:.+)/"


class Rules:
    """Rules, collected under names of their own, for a tokenizer with these special tokens."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._find = any_of(special)
        self._rules: list[str] = []

    def rule(self, expression: str) -> str:
        """The name of a new rule. An empty expression matches nothing but the empty text."""
        self._rules.append(f"r{len(self._rules)}: {expression}")
        return f"r{len(self._rules) - 1}"

    def terminal(self, expression: str) -> str:
        self._rules.append(f"T{len(self._rules)}: {expression}")
        return f"T{len(self._rules) - 1}"

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])

    def exactly(self, text: str) -> str:
        return " ".join(self._parts(text)) or '""'

    def until(self, text: str, content: str = ANY) -> str:
        """What `content` (an expression for a terminal) matches, and the first `text` after it."""
        first, *rest = self._parts(text)
        if first.startswith("<"):
            return " ".join([self.terminal(content), first, *rest])
        # The text may overlap with itself, so it is the whole that must not have it earlier.
        earlier = f"{ANY} {first} {SOME}"
        return " ".join([self.terminal(f"(({content}) {first}) & ~({earlier})"), *rest])

    def free(self, text: str) -> str:
        """Any text without `text`."""
        first = self._parts(text)[0]
        if first.startswith("<"):
            return self.terminal(ANY)
        return self.terminal(f"{ANY} & ~({ANY} {first} {ANY})")

    def _parts(self, text: str) -> list[str]:
        parts, at = [], 0
        for found in self._find.finditer(text):
            if found.start() > at:
                parts.append(quoted(text[at : found.start()]))
            parts.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        return parts + ([quoted(text[at:])] if at < len(text) else [])


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_value(schema: Any) -> str:
    """What a JSON schema allows."""
    return f"%json {json.dumps(schema)}"
