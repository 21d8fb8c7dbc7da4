"""HumanEval: the program that an answer amounts to.

Pure functions: no MLX, no files; what runs the program is the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import dedent
from typing import NamedTuple

# Where a base model starts the next top-level statement (Chen et al., arXiv:2107.03374, section 2.2
# but for comments: those may still belong to a function).
STOPS = ("\nclass ", "\ndef ", "\nif ", "\nprint", "\n@", "\n```", "\nassert ")

_FENCE = re.compile(r"([ \t]*)(`{3,})([^`\n]*)$", re.MULTILINE)
# Group 2 is there where a triple-quoted string never ends.
_STRING = re.compile(
    r"(\"{3}|'{3})(?:\\.|.)*?(?:\1|(\Z))|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|#[^\n]*",
    re.DOTALL,
)


class Block(NamedTuple):
    """The code of a fenced block, where the block ends in the text, and whether it is closed."""

    code: str
    end: int
    closed: bool


def blocks(text: str) -> Iterator[Block]:
    """The fenced code blocks of an answer in Markdown, without the indentation of a list item.

    A fence inside a docstring, as around an example, does not close a block.
    """
    fences = list(_FENCE.finditer(text))
    while fences:
        opening, *fences = fences
        start = opening.end() + 1
        ends = [f for f in fences if text[f.start() - 1] == "\n" and not f[3].strip()]
        closing = next((f for f in ends if not _open_string(text[start : f.start()])), None)
        last = closing or next(iter(ends), None)  # a string that never ends
        code = text[start:] if last is None else text[start : max(start, last.start() - 1)]
        end = len(text) if last is None else last.end()
        code = re.sub(rf"^[ \t]{{0,{len(opening[1])}}}", "", code, flags=re.MULTILINE)
        yield Block(dedent(code), end, closing is not None)
        fences = [f for f in fences if f.start() >= end]


def _open_string(code: str) -> bool:
    return any(string[2] is not None for string in _STRING.finditer(code))


def base_stop(text: str) -> int | None:
    """Where the completed function is over, or None while it may go on."""
    return min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=None)


def instruct_stop(text: str, entry_point: str) -> int | None:
    """The end of a closed code block that defines the function, once the line after it has begun.

    Further blocks (usage, tests) would not be better answers.
    """
    for block in blocks(text):
        if block.closed and block.end < len(text) and _defines(block.code, entry_point):
            return block.end
    return None


def extract(text: str, entry_point: str) -> str | None:
    """The last code block that defines the function, even one cut short.

    Without any block, all of a text that defines it.
    """
    defining = [block.code for block in blocks(text) if _defines(block.code, entry_point)]
    if defining:
        return defining[-1]
    return text if "```" not in text and _defines(text, entry_point) else None


def instruct_program(prompt: str, code: str, entry_point: str) -> str:
    """`code` after what the prompt has before the function: imports and helpers it may use."""
    return f"{_before(prompt, entry_point)}\n{code}\n"


def test_program(prompt: str, test: str, entry_point: str) -> str:
    """The test, apart from the candidate: with the helpers it calls, and the candidate by name.

    HumanEval/33 compares with what the function of that name returns, 38 and 50 encode first.
    """
    return (
        f"{_before(prompt, entry_point)}\n{test}\n\n_check = check\n\n\n"
        f"def check(candidate):\n    global {entry_point}\n"
        f"    {entry_point} = candidate\n    _check(candidate)\n"
    )


def _before(prompt: str, entry_point: str) -> str:
    start = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: start.start()] if start else ""


def _defines(code: str, entry_point: str) -> bool:
    return re.search(rf"^[ \t]*def {re.escape(entry_point)}\b", code, re.MULTILINE) is not None
