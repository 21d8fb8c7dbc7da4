"""What the instructions' arguments may be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .language import CODES


@dataclass(frozen=True)
class Parameter:
    """`description` completes "needs as 'x' ..."."""

    description: str
    accepts: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_pattern(value: Any) -> bool:
    try:
        return _is_text(value) and bool(re.compile(value))
    except re.error:
        return False


def _are_patterns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_pattern, value))


COUNT = Parameter("a whole number of at least 0", lambda v: type(v) is int and v >= 0)
INDEX = Parameter("a whole number of at least 1", lambda v: type(v) is int and v >= 1)
RELATION = Parameter("'less than' or 'at least'", lambda v: v in ("less than", "at least"))
TEXT = Parameter("a text", _is_text)
CHARACTER = Parameter("one character", lambda v: _is_text(v) and len(v) == 1)
LANGUAGE = Parameter("an ISO 639-1 code that IFEval knows", lambda v: _is_text(v) and v in CODES)
# The official scorer searches for keywords as regular expressions.
PATTERN = Parameter("a text that is a regular expression", _is_pattern)
PATTERNS = Parameter("a list of texts that are regular expressions", _are_patterns)
