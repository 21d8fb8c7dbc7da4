"""A size as users write it: "uniform4", "4.8bpw", "6.1GB", "512MiB" or plain bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import UsageError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


_BITS = 32  # a plain number up to this is meant as bits per weight


@dataclass(frozen=True)
class Size:
    """`text` as it was written, and what it says: exactly one of the others, or uniform 4-bit."""

    text: str
    nbytes: Fraction | None = None  # of the weight files
    bpw: Fraction | None = None  # of the tensors, per logical parameter

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str | float) -> Size:
        """Read a size; UsageError for one that is not understood. GB and MB are decimal."""
        written = str(text)
        size = written.strip().lower().replace("_", "")
        if size == "uniform4":
            return cls(written)
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size):
            number, unit = Fraction(match[1]), match[2]
            if unit == "bpw":
                return cls(written, bpw=number)
            if not unit and number <= _BITS:
                raise UsageError(
                    f"size {size} would be bytes; write {size}bpw for bits per weight, or 6.1GB"
                )
            if unit in _UNITS and (unit or number.denominator == 1):
                return cls(written, nbytes=number * _UNITS[unit])
        raise UsageError(f"size {size!r} is not understood; write uniform4, 4.8bpw, 6.1GB or bytes")

    def budget(self, *, params: int, uniform4: int, beside: int = 0) -> int:
        """Bytes of tensors for a model of `params` parameters.

        A size in bytes is one of weight files, so what they hold `beside` is taken off: headers and
        towers. A fraction of a byte is dropped, so that the budget is never exceeded.
        """
        if self.bpw is not None:
            return int(self.bpw * params / 8)
        if self.nbytes is not None:
            return max(0, int(self.nbytes) - beside)
        return uniform4


UNIFORM4_SIZE = Size("uniform4")
