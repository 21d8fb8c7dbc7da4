"""Tokens of preprocessed Metal source, enough for the small rewrites of rewrite.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"

_TOKEN = re.compile(
    r"""(?P<marker>^\#[^\n]*$)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign>::|\[\[|\]\]|->|[^\s\w])
      | (?P<space>\s+)""",
    re.MULTILINE | re.VERBOSE,
)
_MARKER = re.compile(r'^# \d+ "([^"]*)".*\n', re.MULTILINE)
_MARKER_LINE = re.compile(r'# (\d+) "([^"]*)"')
_CLOSES = {"(": ")", "[": "]", "{": "}", "[[": "]]", "<": ">"}


class Token:
    """One token. Rewriting sets `text`; the empty string removes it."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text

    @property
    def blank(self) -> bool:
        return not self.text or self.kind in ("space", "marker", "library")


class SyntaxProblem(ValueError):
    """The source has a form that the rewriter does not understand."""


class Tokens(list[Token]):
    """The tokens of a file. What comes from the folders of a standard library stays one token:
    nothing in it changes."""

    @classmethod
    def of(cls, preprocessed: str, libraries: Sequence[Path] = (INCLUDE,)) -> Tokens:
        tokens = cls()
        for library, chunk in _chunks(preprocessed, libraries):
            if library:
                tokens.append(Token("library", chunk))
            else:
                tokens.extend(
                    Token(m.lastgroup or "space", m.group()) for m in _TOKEN.finditer(chunk)
                )
        return tokens

    def __str__(self) -> str:
        return "".join(token.text for token in self)

    def next(self, at: int) -> int:
        """Index of the next token that is neither space nor removed; len(self) at the end."""
        at += 1
        while at < len(self) and self[at].blank:
            at += 1
        return at

    def previous(self, at: int) -> int:
        """Index of the token before, as in `next`; -1 at the start."""
        at -= 1
        while at >= 0 and self[at].blank:
            at -= 1
        return at

    def text(self, at: int) -> str:
        return self[at].text if 0 <= at < len(self) else ""

    def where(self, at: int) -> str:
        """file:line of a token, from the line marker before it."""
        breaks = 0
        for token in reversed(self[:at]):
            if token.kind == "marker" and (m := _MARKER_LINE.match(token.text)):
                return f"{m.group(2)}:{int(m.group(1)) + breaks - 1}"
            breaks += token.text.count("\n") if token.kind != "library" else 0
        return f"line {breaks + 1}"

    def close(self, at: int) -> int:
        """Index of the bracket that closes the one at `at`."""
        open_brackets: list[str] = []
        for i in range(at, len(self)):
            text = self[i].text
            if self[i].kind != "sign":
                continue
            if text in _CLOSES and (text != "<" or not open_brackets or open_brackets[-1] == ">"):
                open_brackets.append(_CLOSES[text])
            elif text == open_brackets[-1]:
                open_brackets.pop()
            elif text == "]]" and open_brackets[-2:] == ["]", "]"]:  # a[b[c]] closes two
                del open_brackets[-2:]
            if not open_brackets:
                return i
        raise SyntaxProblem(f"unbalanced {self[at].text!r}")

    def join(self, start: int, end: int) -> str:
        """Text of [start, end) on one line, without line markers."""
        text = "".join(t.text for t in self[start:end] if t.kind != "marker")
        return re.sub(r"\s+", " ", text).strip()

    def replace(self, start: int, end: int, text: str) -> None:
        """Put `text` in place of [start, end), keeping its line breaks for later line numbers."""
        for token in self[start:end]:
            if token.kind == "space":
                token.text = "\n" * token.text.count("\n")
            elif token.kind not in ("marker", "library"):
                token.text = ""
        self[start].kind = "done"
        self[start].text = text


def _chunks(preprocessed: str, libraries: Sequence[Path]) -> Iterator[tuple[bool, str]]:
    """(whether it is of a standard library, text) in order."""
    start, library = 0, False
    for marker in _MARKER.finditer(preprocessed):
        path = Path(marker.group(1))
        inside = any(path.is_relative_to(folder) for folder in libraries)
        if inside != library:
            if marker.start() > start:
                yield library, preprocessed[start : marker.start()]
            start, library = marker.start(), inside
    yield library, preprocessed[start:]
