"""HumanEval: the program that an answer amounts to.

Pure functions: no MLX, no files; what runs the program is the sandbox.
"""

from __future__ import annotations

import re

# Where a base model starts the next top-level statement (Chen et al., arXiv:2107.03374, section 2.2
# but for comments: those may still belong to a function).
STOPS = ("\nclass ", "\ndef ", "\nif ", "\nprint", "\n@", "\n```", "\nassert ")

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def base_stop(text: str) -> int | None:
    """Where the completed function is over, or None while it may go on."""
    return min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=None)


def instruct_stop(text: str, entry_point: str) -> int | None:
    """The end of a closed code block that defines the function, once the line after it has begun.

    Further blocks (usage, tests) would not be better answers.
    """
    for block in _BLOCK.finditer(text):
        closed = block[0].rstrip().endswith("```") and block.end() < len(text)
        if closed and _defines(block[1], entry_point):
            return block.end()
    return None


def extract(text: str, entry_point: str) -> str | None:
    """The last code block that defines the function, even one cut short.

    Without any block, all of a text that defines it.
    """
    blocks = [block for block in _BLOCK.findall(text) if _defines(block, entry_point)]
    if blocks:
        return str(blocks[-1])
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
