"""Two sequential colour scales, even in lightness, so that order survives colour blindness.

Both run in OKLCH (Ottosson 2020, "A perceptual color space for image processing"): lightness
falls linearly from end to end while hue turns slowly, so a greyscale print keeps the order.
In a dark scheme the scale is walked the other way: the strongest value always stands out most
from the page.
"""

from __future__ import annotations

from math import cos, radians, sin

LEVELS = 20

# (lightness, chroma, hue in degrees) at the pale end, the middle and the deep end
Scale = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
WARM: Scale = ((0.96, 0.035, 95.0), (0.64, 0.155, 40.0), (0.32, 0.105, -10.0))
COOL: Scale = ((0.95, 0.030, 175.0), (0.635, 0.085, 222.0), (0.32, 0.110, 268.0))

RGB = tuple[float, float, float]


def oklch(lightness: float, chroma: float, hue: float) -> RGB:
    """Linear-light sRGB of an OKLCH colour, clipped to the gamut."""
    a, b = chroma * cos(radians(hue)), chroma * sin(radians(hue))
    l3 = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m3 = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s3 = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    rgb = (
        4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
        -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
        -0.0041960863 * l3 - 0.7034186147 * m3 + 1.7076147010 * s3,
    )
    return tuple(min(1.0, max(0.0, c)) for c in rgb)  # type: ignore[return-value]


def ramp(scale: Scale, t: float) -> RGB:
    """Linear-light sRGB at `t` in [0, 1], pale to deep."""
    pale, middle, deep = scale
    (start, end, u) = (pale, middle, 2 * t) if t < 0.5 else (middle, deep, 2 * t - 1)
    return oklch(*(p + (q - p) * u for p, q in zip(start, end, strict=True)))


def to_hex(rgb: RGB) -> str:
    """ "#rrggbb" of a linear-light colour (sRGB transfer function, IEC 61966-2-1)."""
    coded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in rgb)
    return "#" + "".join(f"{round(255 * c):02x}" for c in coded)


def luminance(rgb: RGB) -> float:
    """Relative luminance of a linear-light colour (WCAG 2)."""
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def ink(rgb: RGB) -> str:
    """Black or white, whichever reads better on `rgb`; the better one always reaches 4.5 : 1."""
    y = luminance(rgb) + 0.05
    return "#000" if y / 0.05 >= 1.05 / y else "#fff"


def rules(prefix: str, scale: Scale, *, dark: bool) -> str:
    """CSS classes `.{prefix}0` (weakest) to `.{prefix}{LEVELS-1}` (strongest)."""
    lines = []
    for level in range(LEVELS):
        t = level / (LEVELS - 1)
        rgb = ramp(scale, 1 - t if dark else t)
        lines.append(f".{prefix}{level}{{background:{to_hex(rgb)};color:{ink(rgb)}}}")
    return "\n".join(lines)


def stylesheet() -> str:
    """Classes `k*` (warm, KL) and `f*` (cool, formats) for both colour schemes."""
    light = rules("k", WARM, dark=False) + "\n" + rules("f", COOL, dark=False)
    dark = rules("k", WARM, dark=True) + "\n" + rules("f", COOL, dark=True)
    return f"{light}\n@media screen and (prefers-color-scheme:dark){{\n{dark}\n}}"
