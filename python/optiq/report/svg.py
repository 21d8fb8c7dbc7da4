"""The line chart of size against KL as inline SVG: linear bytes across, KL on a log scale up."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

from .curve import Curve, Mark
from .text import UNITS, esc, number, plus_minus, size

TOP, RIGHT, BOTTOM, LEFT = 30, 18, 46, 58  # px around the plot
LINE = 15  # px between two labels that would overlap
GLYPH = 7.5  # px, a generous width of one letter
MARK_SIZE = 11  # px across


def chart(curve: Curve, width: int, height: int) -> str:
    """An `<svg>` of `width` x `height` px. Text stays at its own size: draw it again, narrower,
    for a narrow screen instead of scaling it."""
    spots = [(p.nbytes, p.kl) for p in curve.marks] + curve.frontier + curve.uniform
    spots += [(p.nbytes, p.kl + (p.se or 0)) for p in curve.marks]
    spots += [(p.nbytes, p.kl - (p.se or 0)) for p in curve.marks]
    heights = [kl for _, kl in spots if kl > 0]
    if not heights:
        return ""
    plot = _Plot([b for b, _ in spots], heights, width, height)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{esc(_description(curve))}">',
        *_axes(plot, curve.across),
    ]
    for css, line in (("frontier plain", curve.uniform), ("frontier", curve.frontier)):
        points = " ".join(f"{plot.x(b):.1f},{plot.y(kl):.1f}" for b, kl in line if kl > 0)
        if points:
            parts.append(f'<polyline class="{css}" points="{points}"/>')
    drawn = [p for p in curve.marks if p.kl > 0]
    parts += [_mark(plot, p) for p in drawn]
    parts += _labels(plot, drawn)
    return "\n".join([*parts, "</svg>"])


def _description(curve: Curve) -> str:
    """The chart in words, for those who do not see it."""
    marks = "; ".join(_sentence(p) for p in sorted(curve.marks, key=lambda p: p.nbytes))
    return f"KL divergence against the {curve.across}. {marks}."


class _Plot:
    """Maps bytes and KL to pixels."""

    def __init__(self, xs: list[int], ys: list[float], width: int, height: int) -> None:
        margin = 0.04 * (max(xs) - min(xs)) or 0.1 * max(xs)
        self.left, self.right = min(xs) - margin, max(xs) + margin
        self.low, self.high = log10(min(ys)) - 0.4, log10(max(ys)) + 0.1
        self.width, self.height = width, height

    def x(self, nbytes: float) -> float:
        share = (nbytes - self.left) / (self.right - self.left)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        """Values below the axis (an error bar that reaches zero) end on it."""
        share = (log10(kl) - self.low) / (self.high - self.low) if kl > 0 else 0
        return self.height - BOTTOM - max(0.0, share) * (self.height - TOP - BOTTOM)


def _x_ticks(plot: _Plot) -> list[float]:
    """Round sizes, 70 px apart or more."""
    wanted = (plot.right - plot.left) / max(2, (plot.width - LEFT - RIGHT) // 70)
    power = 10 ** floor(log10(wanted))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= wanted)
    return [i * step for i in range(ceil(plot.left / step), floor(plot.right / step) + 1)]


def _y_ticks(plot: _Plot) -> list[float]:
    """1, 2 and 5 of each decade, or the decades alone when there are many."""
    decades = plot.high - plot.low
    digits = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    ticks = [d * 10.0**e for e in range(floor(plot.low), ceil(plot.high) + 1) for d in digits]
    return [t for t in ticks if plot.low <= log10(t) <= plot.high]


def _axes(plot: _Plot, across: str) -> list[str]:
    floor_y, end_x = plot.height - BOTTOM, plot.width - RIGHT
    parts = [_text("tick", 4, TOP - 14, "KL, nats per token")]
    for kl in _y_ticks(plot):
        y = plot.y(kl)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{end_x}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick end", LEFT - 8, y + 4, number(kl, 1)))
    unit, scale = next(u for u in UNITS if plot.right >= u[1])
    for nbytes in _x_ticks(plot):
        x = plot.x(nbytes)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor_y}" y2="{floor_y + 5}"/>'
        )
        parts.append(_text("tick mid", x, floor_y + 19, f"{nbytes / scale:g} {unit}"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{end_x}" y1="{floor_y}" y2="{floor_y}"/>')
    parts.append(_text("tick end", end_x, plot.height - 8, across))
    return parts


def _text(css: str, x: float, y: float, text: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{esc(text)}</text>'


def _mark(plot: _Plot, p: Mark) -> str:
    """Circles for plans, squares for uniform widths, triangles for recipes; filled when measured,
    hollow when not."""
    x, y = plot.x(p.nbytes), plot.y(p.kl)
    css = f"mark {p.kind}{' measured' if p.measured else ''}"
    parts = [f'<g class="{css}"><title>{esc(_sentence(p))}</title>']
    if p.se:
        high, low = plot.y(p.kl + p.se), plot.y(p.kl - p.se)
        parts.append(
            f'<path class="error" d="M{x:.1f} {high:.1f}V{low:.1f}'
            f'M{x - 5:.1f} {high:.1f}h10M{x - 5:.1f} {low:.1f}h10"/>'
        )
    if p.kind == "plan":
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
    elif p.kind == "recipe":
        parts.append(f'<path d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z"/>')
    else:
        parts.append(f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>')
    return "".join([*parts, "</g>"])


def _sentence(p: Mark) -> str:
    how = "measured" if p.measured else "predicted"
    return f"{p.label}: {size(p.nbytes)}, {how} KL {plus_minus(p.kl, p.se)} nats per token"


def _labels(plot: _Plot, marks: list[Mark]) -> list[str]:
    """Each label beside its mark where it covers no other label and no mark: plans rather to the
    left, below their line, others to the right, above it.

    The predicted and the measured mark of one model share a label when they are close. A label
    that finds no room is left out: its mark still has a title.
    """
    taken = [_Box.around(plot.x(p.nbytes), plot.y(p.kl), MARK_SIZE, MARK_SIZE) for p in marks]
    parts, said = [], dict[str, float]()
    for p in sorted(marks, key=lambda p: (p.kind != "plan", plot.y(p.kl))):
        x, y = plot.x(p.nbytes), plot.y(p.kl)
        if p.label in said and abs(y - said[p.label]) < LINE:
            continue
        width = GLYPH * len(p.label)
        left = [("end", x - 12, y), ("end", x - 8, y + 10)]
        right = [("start", x + 11, y), ("start", x + 8, y - 10), ("start", x + 8, y + 10)]
        below = [("mid", x, y + 18), ("start", x, y + 18), ("end", x, y + 18)]
        above = [("mid", x, y - 18), ("start", x, y - 18), ("end", x, y - 18)]
        plan, other = [*left, *below, *right, *above], [*right, *above, *left, *below]
        for css, at, height in plan if p.kind == "plan" else other:
            middle = at + {"start": width / 2, "mid": 0, "end": -width / 2}[css]
            box = _Box.around(middle, height, width, LINE)
            if box.inside(plot) and not any(map(box.meets, taken)):
                taken.append(box)
                said[p.label] = y
                parts.append(_text(f"label {p.kind} {css}", at, height + 4, p.label))
                break
    return parts


@dataclass(frozen=True)
class _Box:
    """A rectangle in px."""

    left: float
    right: float
    top: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> _Box:
        return cls(x - width / 2, x + width / 2, y - height / 2, y + height / 2)

    def inside(self, plot: _Plot) -> bool:
        """Within the axes; above them there is room for half a line more."""
        return (
            self.left >= LEFT
            and self.right <= plot.width
            and self.top >= TOP - LINE / 2
            and self.bottom <= plot.height - BOTTOM
        )

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )
