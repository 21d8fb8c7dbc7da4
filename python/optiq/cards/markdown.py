"""Text in Markdown: escaped, in one line, never broken by what a file is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


def code(text: object) -> str:
    """An identifier as code; nothing for nothing."""
    shown = plain(text).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else ""


def inline(text: object) -> str:
    """Text that Markdown shows as it is, in a line and in a cell."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(plain(text), quote=False))


def plain(text: object) -> str:
    """The text in one line, without control characters and direction overrides."""
    return _CONTROL.sub(" ", str(text)).strip()


def table(rows: Sequence[Sequence[str]], *, words: int = 0) -> str:
    """Rows of ready cells, the first of them the head.

    Columns are numbers, to the right, but for the first and the last `words` of them.
    """
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1 - words), *["---"] * words]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def pairs(values: Mapping[str, object]) -> str:
    """Key and value of what is known, comma-separated."""
    known = {key: value for key, value in values.items() if value is not None}
    return ", ".join(f"{inline(key)} {inline(value)}" for key, value in known.items())
