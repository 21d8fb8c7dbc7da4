"""Scoring of GSM8K by the filters of lm-eval's `gsm8k_cot`: exact match of a number.

It differs in three points: dots alone are not a number, dots around a number are not part of it,
and 29.00 is 29.

Pure functions: no MLX, no files.
"""

from __future__ import annotations

import re

# The last full stop stands for any character, as it does in lm-eval's configuration.
_STRICT = re.compile(r"The answer is (-?[0-9.,]+).")
_NUMBER = re.compile(r"-?[$.,]*[0-9][$0-9.,]*")


def gold(answer: str) -> str:
    """The number after the #### of a reference answer."""
    return _plain(answer.rsplit("####", 1)[-1].strip())


def strict(text: str) -> str | None:
    """The number of the first "The answer is N." that the answer holds."""
    found = _STRICT.search(text)
    return _plain(found[1]) if found else None


def flexible(text: str) -> str | None:
    """The last number of the answer, whatever stands around it."""
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """Without thousands separators, dollar signs, dots around it and zeros after the point."""
    bare = re.sub(r"^(-?)\.{2,}", r"\1", re.sub(r"[,$]", "", number).strip().rstrip("."))
    return re.sub(r"\.0+$", "", bare)
