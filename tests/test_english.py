"""Plain English: phrases that a reader has to untangle do not come back."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ("README.md", "CONTRIBUTING.md", "docs", "python", "bench")

# What it says, and what to say instead.
PHRASES = {
    r"(?<!here )\bis no (?!longer\b|more than\b)[a-z]": "X is not a Y",
    r"(?<!here )(?<!here )\bare no (?!longer\b)[a-z]": "X are not Y",
    r"(?<!here )\b(is|are) none of\b": "is not one of",
    r"\bhad better\b": "should",
    r"\bso-manieth\b": "every n-th",
    r"\b(is|was|were|are) to be had\b": "is available",
    r"\bcan be had\b": "works, is available",
    r"\bhangs? on\b": "depends on, is still open",
    r"\bthe house\b": "source layout",
    r"\bNot in (a|the) \w+ is that\b": "Scores ignore one effect",
    r"\bTrained are\b": "Each group gets trainable numbers",
    r"\bStated were\b|, stated\s+were\b": "the estimate was",
    r"\bwith what drives\b|\bwhat drives them\b": "round so that the output changes least",
    r"\bwithout making them worse\b": "with far less loss at the same size",
    r"\bnot certainly none\b": "has a non-zero upper limit",
    r"\bof its at\b": "times the other's",
    r"\bmade with another rounded weights\b": "made with other rounded weights",
    r"\bcounts? the tensors; a size\b": "limit tensor bytes",
    r"\bthat does not hold on text\b": "does not lower the error on unseen text",
    r"\bshows when later tokens\b": "appears when later tokens",
    r"[a-z], too[.,;:)]": "also, as well",
}


@cache
def texts() -> list[tuple[str, str]]:
    """Each file with its text on one line."""
    found = []
    for place in PLACES:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".md", ".py"):
                text = re.sub(r"\s+(# )?", " ", file.read_text(encoding="utf-8"))
                found.append((str(file.relative_to(ROOT)), text))
    return found


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_do_not_come_back(phrase: str) -> None:
    found = [
        f"{name}: ...{text[max(0, match.start() - 40) : match.end() + 20]}...: {PHRASES[phrase]}"
        for name, text in texts()
        for match in re.finditer(phrase, text)
    ]
    assert not found, "\n".join(found)


def test_the_phrases_are_found_where_they_stand() -> None:
    """Else the patterns could be wrong and never match."""
    said = (
        "it is no plain file; these are no words; it is none of these; you had better; "
        "the so-manieth; "
        "nothing is to be had; it can be had; what it hangs on; the house; Not in a score is that; "
        "Trained are two; 0.89 GB, stated were 1.13; with what drives it; "
        "without making them worse; "
        "not certainly none; 0.23 of its at 4.5; made with another rounded weights; "
        "count the tensors; a size in bytes; that does not hold on text; shows when later tokens; "
        "the head, too."
    )
    assert [phrase for phrase in PHRASES if not re.search(phrase, said)] == []
    fine = "there is no file; there are no rows; it is no longer there; too few, too many"
    assert [phrase for phrase in PHRASES if re.search(phrase, fine)] == []
