"""What each format of the menu does to the weights and to the output, over all modules."""

from __future__ import annotations

from math import fsum, prod
from statistics import median

from ..formats import DENSE, Format
from .layout import Grid
from .text import data


def table(grid: Grid, itemsize: int) -> str:
    """One row per format: bits per weight, modules, median relative error, sum of KL."""
    menu = {fmt for cell in grid.cells for fmt in cell.scores} - {DENSE}
    rows = "".join(_row(grid, fmt, itemsize) for fmt in sorted(menu))
    head = "<th>format</th><th>bits per weight</th><th>modules</th>"
    head += "<th>weight error (median)</th><th>KL (sum)</th>"
    return (
        "<p>Every module that was measured in a format, whatever the plan gives it. The weight "
        "error is the squared rounding error over the squared weights; the KL is the sum over "
        "these modules, in nats per token. A smaller weight error need not mean a smaller KL: "
        "that is why plans go by the KL.</p>"
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(grid: Grid, fmt: Format, itemsize: int) -> str:
    cells = [cell for cell in grid.cells if fmt in cell.scores]
    errors = [mse for cell in cells if (mse := cell.scores[fmt].mse) is not None]
    weights = sum(prod(cell.module.shape) for cell in cells)
    bits = 8 * sum(fmt.nbytes(cell.module.shape, itemsize) for cell in cells) / weights
    return (
        f'<tr><th scope="row">{fmt}</th><td>{data(bits)}</td>'
        f"<td>{len(cells)}</td><td>{data(median(errors) if errors else None)}</td>"
        f"<td>{data(fsum(cell.scores[fmt].kl for cell in cells))}</td></tr>"
    )
