"""Colours, numbers, layout and the curve, each against its definition."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import pairwise
from random import Random

import pytest

from optiq.formats import Format
from optiq.report import colors
from optiq.report.curve import Curve, Mark, trace
from optiq.report.layout import LogScale, format_level, lay_out
from optiq.report.svg import chart
from optiq.report.text import MINUS, TIMES, esc, number, plus_minus, size

from . import fakes
from .page import read

PAIR = re.compile(r"background:(#\w+);color:(#\w+)")


def luminance(color: str) -> float:
    """WCAG 2 relative luminance of "#rgb" or "#rrggbb"."""
    text = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    linear = []
    for i in (0, 2, 4):
        c = int(text[i : i + 2], 16) / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ascii_signs(text: str) -> str:
    return text.replace(TIMES, "x").replace(MINUS, "-")


def test_text_on_every_colour_reads_well() -> None:
    pairs = PAIR.findall(colors.stylesheet())
    assert len(pairs) == 4 * colors.LEVELS
    assert min(contrast(*pair) for pair in pairs) >= 4.5


def test_text_on_the_page_reads_well() -> None:
    css = files("optiq.report").joinpath("style.css").read_text(encoding="utf-8")
    schemes = re.findall(r"--page: (#\w+).*?--accent: #\w+", css, re.DOTALL)
    assert len(schemes) == 2
    for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        variables = dict(re.findall(r"--(\w+): (#\w+)", block))
        for name in ("text", "quiet", "accent", "cool"):
            assert contrast(variables[name], variables["page"]) >= 4.5
        assert contrast(variables["text"], variables["wash"]) >= 4.5


@pytest.mark.parametrize("scale", [colors.WARM, colors.COOL])
@pytest.mark.parametrize("dark", [False, True])
def test_scales_are_ordered_in_lightness(scale: colors.Scale, dark: bool) -> None:
    css = colors.rules("k", scale, dark=dark)
    shades = [luminance(background) for background, _ in PAIR.findall(css)]
    assert shades == sorted(shades, reverse=not dark)
    lightness = [y ** (1 / 3) for y in shades]
    steps = [abs(b - a) for a, b in pairwise(lightness)]
    assert max(steps) < 2.5 * min(steps)


def test_oklch_landmarks() -> None:
    assert colors.to_hex(colors.oklch(1, 0, 0)) == "#ffffff"
    assert colors.to_hex(colors.oklch(0, 0, 0)) == "#000000"
    assert colors.to_hex(colors.oklch(0.627955, 0.257683, 29.2339)) == "#ff0000"
    assert colors.to_hex(colors.oklch(0.452014, 0.313214, 264.052)) == "#0000ff"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0123456, "0.0123"), (1.5, "1.50"), (12.34, "12.3"), (123.4, "123"),
     (0.00001234, "1.23x10⁻⁵"), (-0.5, "-0.500"), (2.5e7, "2.50x10⁷")],
)  # fmt: skip
def test_number(value: float, shown: str) -> None:
    assert ascii_signs(number(value)) == shown


@pytest.mark.parametrize(
    ("mean", "se", "shown"),
    [(0.012345, 0.00112, "0.0123 ± 0.0011"), (0.5, None, "0.500"), (84.73, 0.412, "84.73 ± 0.41"),
     (0.00002, 0.000003, "2.00x10⁻⁵ ± 3.0x10⁻⁶")],
)  # fmt: skip
def test_plus_minus(mean: float, se: float | None, shown: str) -> None:
    assert ascii_signs(plus_minus(mean, se)) == shown


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(12, "12 bytes"), (75_715_200, "75.7 MB"), (4_210_000_000, "4.21 GB"), (1500, "1.50 kB")],
)
def test_size(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown


def test_escape_covers_attributes() -> None:
    assert esc("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"


def test_log_scale_spreads_its_ends() -> None:
    scale = LogScale.over([1e-5, 0, 1e-3, 1e-1])
    top = colors.LEVELS - 1
    assert [scale.level(v) for v in (0, 1e-5, 1e-1, 9)] == [0, 0, top, top]
    assert abs(scale.level(1e-3) - top / 2) <= 0.5
    equal = LogScale.over([0.01, 0.01])
    assert abs(equal.level(0.01) - top / 2) <= 0.5
    assert LogScale.over([]).level(1.0) == top


def test_more_bits_have_a_stronger_colour() -> None:
    names = ("2g64", "3g64", "4g64", "5g64", "6g64", "8g64", "bf16")
    levels = [format_level(Format.parse(name)) for name in names]
    assert levels == sorted(set(levels))
    assert format_level(Format.parse("4g32")) > levels[2] > format_level(Format.parse("4g128"))


def test_nearest_width_to_four() -> None:
    plan, scores = fakes.tiny()
    scores["modules"][0]["scores"] = {"8g64": {"kl": 0.1}, "5g64": {"kl": 0.2}, "3g64": {"kl": 1.0}}
    scores["modules"][1]["scores"] = {"bf16": {"kl": 0}}
    cells = lay_out(*fakes.parse((plan, scores))).cells
    assert [str(cell.near4()) for cell in cells[:3]] == ["3g64", "None", "4g64"]


def test_columns_keep_modules_of_one_leaf_name_apart() -> None:
    pair = fakes.moe()
    grid = lay_out(*fakes.parse(pair))
    assert len(grid.columns) == len(set(grid.columns)) == 15
    placed = [cell for row in grid.rows for cell in [*row.cells.values(), row.single] if cell]
    assert sorted(c.module.path for c in placed) == sorted(m["path"] for m in pair[0]["modules"])


def test_the_curve_has_the_plan_and_every_width_that_was_scored() -> None:
    plan, scores = fakes.tiny()
    del scores["modules"][3]["scores"]["5g64"]
    curve = trace(*fakes.parse((plan, scores)))
    assert [(mark.label, mark.measured, mark.se is not None) for mark in curve.marks] == [
        *((f"{bits}-bit everywhere", False, False) for bits in (3, 4, 6, 8)),
        ("plan", False, False),
        ("plan", True, True),
        ("stock uniform 4-bit", True, True),
    ]
    assert curve.unpredicted == [5]
    stock = sum(Format.parse("4g64").nbytes(m["shape"]) for m in scores["modules"])
    four, planned = curve.marks[1], curve.marks[4]
    assert four.nbytes == stock + scores["model"]["fixed_bytes"]
    assert four.kl == pytest.approx(sum(m["scores"]["4g64"]["kl"] for m in scores["modules"]))
    assert planned.nbytes == plan["nbytes"]
    assert planned.kl == pytest.approx(plan["objective"]["predicted_kl"], rel=1e-12)
    assert curve.frontier[-1][0] <= max(mark.nbytes for mark in curve.marks)


@pytest.fixture(scope="module")
def curve() -> Curve:
    return trace(*fakes.parse(fakes.smollm2()))


@pytest.mark.parametrize("width", [360, 810])
def test_chart_stays_inside_its_box(curve: Curve, width: int) -> None:
    svg = read(chart(curve, width, 340)).first("svg")
    (line,) = svg.all("polyline")
    points = [tuple(map(float, p.split(","))) for p in line.attrs["points"].split()]
    xs = [x for x, _ in points] + [float(t.attrs["x"]) for t in svg.all("text")]
    ys = [y for _, y in points] + [float(t.attrs["y"]) for t in svg.all("text")]
    assert min(xs) >= 0
    assert max(xs) <= width
    assert min(ys) >= 0
    assert max(ys) <= 340
    assert len(list(svg.all("g", "measured"))) == 2
    assert len(list(svg.all("path", "error"))) == 2
    assert "measured KL" in svg.first("g", "measured").first("title").text


@pytest.mark.parametrize("width", [360, 810])
def test_labels_cover_neither_each_other_nor_the_axis(width: int) -> None:
    rng = Random(width)
    spots = [(rng.randrange(300, 900), 10 ** rng.uniform(-3, 0)) for _ in range(14)]
    kinds = ("plan", "uniform", "recipe")
    marks = [
        Mark(f"{kinds[i % 3]} {i}", kinds[i % 3], nbytes, kl, kl / 10, True)
        for i, (nbytes, kl) in enumerate(spots)
    ]
    svg = read(chart(Curve([], marks), width, 400)).first("svg")
    assert len(list(svg.all("g", "mark"))) == len(marks)
    boxes = []
    for text in svg.all("text", "label"):
        x, y, wide = float(text.attrs["x"]), float(text.attrs["y"]), 7.0 * len(text.text)
        left = x - wide * {"start": 0, "mid": 0.5, "end": 1}[text.classes[-1]]
        boxes.append((left, left + wide, y - 10, y + 2))
        assert left >= 58  # right of the axis and its numbers
        assert left + wide <= width
    assert len(boxes) > 8
    for i, (left, right, top, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            assert right <= other[0] or other[1] <= left or bottom <= other[2] or other[3] <= top
