"""Numbers and strings as HTML: escaped, with units, never a zero for what was not measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from math import floor, log10

from ..quality.results import Mean

MISSING = '<span class="missing">not measured</span>'
UNKNOWN = '<span class="missing">not recorded</span>'
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def esc(value: object) -> str:
    """Text safe in an element and in a quoted attribute.

    Control characters, lone surrogates and direction overrides become U+FFFD: they could break
    the encoding of the file or reorder the text around them.
    """
    return escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def breakable(value: object) -> str:
    """Escaped identifier that may wrap after an underscore, a dot or a slash."""
    return re.sub(r"([_./])(?=.)", r"\1<wbr>", esc(value))


def decimals(x: float, digits: int = 3) -> int:
    """Decimal places that show `digits` significant digits of `x`."""
    return max(0, digits - 1 - floor(log10(abs(x)))) if x else 0


def number(x: float, digits: int = 3) -> str:
    """`digits` significant digits; powers of ten below 0.0001 and from a million on."""
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e6:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return (
            f"{mantissa.replace('-', MINUS)}{TIMES}10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        )
    return f"{x:.{decimals(x, digits)}f}".replace("-", MINUS)


def plus_minus(mean: float, se: float | None, digits: int = 3) -> str:
    """ "0.0123 ± 0.0011": the error to two digits, the mean to the same decimal place."""
    if not se:
        return number(mean, digits)
    if max(abs(mean), se) < 1e-4 or abs(mean) >= 1e6:
        return f"{number(mean, digits)} ± {number(se, 2)}"
    places = decimals(se, 2)
    return f"{mean:.{places}f} ± {se:.{places}f}".replace("-", MINUS)


def data(value: float | None, shown: str | None = None) -> str:
    """A figure as `<data>`: rounded for the eye, exact in its `value` attribute."""
    if value is None:
        return MISSING
    return f'<data value="{value}">{shown if shown is not None else number(value)}</data>'


def data_se(stat: Mean | None, scale: float = 1) -> str:
    """Mean ± standard error, both exact in `<data>`."""
    if stat is None:
        return MISSING
    if not stat.se:
        return data(stat.mean, number(stat.mean * scale))
    left, right = plus_minus(stat.mean * scale, stat.se * scale).split(" ± ")
    return f"{data(stat.mean, left)} ± {data(stat.se, right)}"


def size(nbytes: float) -> str:
    """Decimal units as on disks: "75.7 MB"."""
    unit, scale = next(u for u in UNITS if nbytes >= u[1] or u[1] == 1)
    if scale == 1:
        return f"{nbytes:.0f} bytes"
    return f"{nbytes / scale:.{decimals(nbytes / scale)}f} {unit}"


def count(n: int) -> str:
    """Thousands separated: "75,712,384"."""
    return f"{n:,}"


def shape(dims: Sequence[int]) -> str:
    """The dimensions with a multiplication sign between them, rows first."""
    return f" {TIMES} ".join(map(str, dims))
