"""What each format of the menu does to the weights and to the output, over all modules."""

from __future__ import annotations

from math import fsum, prod
from statistics import median

from ..formats import DENSE, Format
from ..planning.plan import MOST_FLIPS
from .document import table as figures
from .layout import Grid
from .text import breakable, data


def table(grid: Grid, itemsize: int) -> str:
    """One row per format: bits per weight, modules, median relative error, sum of KL."""
    menu = {fmt for cell in grid.cells for fmt in cell.scores} - {DENSE}
    rows = [_row(grid, fmt, itemsize) for fmt in sorted(menu)]
    head = ("format", "bits per weight", "modules", "weight error (median)", "KL (sum)")
    return (
        "<p>Every module that was measured in a format, whatever the plan gives it. The weight "
        "error is the squared rounding error over the squared weights; the KL is the sum over "
        "these modules, in nats per token. A smaller weight error need not mean a smaller KL: "
        "that is why plans go by the KL.</p>"
        f"{figures(head, rows)}"
    )


def routers(grid: Grid) -> str:
    """One row per router: the share of its choices of experts that each format changes."""
    cells = [c for c in grid.cells if any(s.flips is not None for s in c.scores.values())]
    if not cells:
        return ""
    menu = sorted({f for c in cells for f, s in c.scores.items() if s.flips is not None})
    rows = [
        [
            breakable(cell.module.path),
            str(cell.format),
            *(data(cell.scores[f].flips if f in cell.scores else None) for f in menu),
        ]
        for cell in cells
    ]
    return (
        "<section><h2>Routers</h2>"
        "<p>The share of a router&rsquo;s choices of experts that change when it alone is rounded. "
        f"A format that changes more than {MOST_FLIPS:g} of them is not given to it if there is "
        "another.</p>"
        f"{figures(('router', 'given', *map(str, menu)), rows)}</section>"
    )


def _row(grid: Grid, fmt: Format, itemsize: int) -> list[str]:
    cells = [cell for cell in grid.cells if fmt in cell.scores]
    errors = [mse for cell in cells if (mse := cell.scores[fmt].mse) is not None]
    weights = sum(prod(cell.module.shape) for cell in cells)
    bits = 8 * sum(fmt.nbytes(cell.module.shape, itemsize) for cell in cells) / weights
    return [
        str(fmt),
        data(bits),
        str(len(cells)),
        data(median(errors) if errors else None),
        data(fsum(cell.scores[fmt].kl for cell in cells)),
    ]
