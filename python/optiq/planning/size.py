"""A size as users write it, in bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import UsageError

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_size(text: str, *, params: int, uniform4: int, header: int = 0) -> int:
    """Bytes of tensors for "uniform4", "4.8bpw" (of `params`), "6.1GB", "512MiB" or plain bytes.

    A size in bytes is one of weight files, so their `header` bytes are taken off. GB and MB are
    decimal. A fraction of a byte is dropped, so that the budget is never exceeded.
    """
    size = text.strip().lower().replace("_", "")
    if size == "uniform4":
        return uniform4
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size)
    if match:
        number, unit = Fraction(match[1]), match[2]
        if unit == "bpw":
            return int(number * params / 8)
        if unit in _UNITS:
            return max(0, int(number * _UNITS[unit]) - header)
        if not unit and number.denominator == 1:
            return max(0, int(number) - header)
    raise UsageError(f"size {text!r} is not understood; write uniform4, 4.8bpw, 6.1GB or bytes")
