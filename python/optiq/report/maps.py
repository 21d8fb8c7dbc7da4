"""The two maps on one grid: how sensitive each module is, and which format it was given."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from ..formats import DENSE, Format
from .colors import LEVELS
from .document import table
from .layout import Cell, Grid, LogScale, format_level
from .text import MISSING, breakable, count, data, esc, number, plus_minus, shape, size

Draw = Callable[[Cell], str]  # one cell as its <td> attributes and content


def sensitivity_map(grid: Grid) -> str:
    """Colour and figure: KL at the measured width nearest to 4 bits, in thousandths of a nat."""
    near4 = [(cell, fmt) for cell in grid.cells if (fmt := cell.near4())]
    kls = {cell.module.path: cell.scores[fmt].kl for cell, fmt in near4}
    scale = LogScale.over(kls.values())

    def draw(cell: Cell) -> str:
        kl = kls.get(cell.module.path)
        if kl is None:
            return f'class="unmeasured" title="{esc(tooltip(cell))}">&ndash;'
        return f'class="k{scale.level(kl)}" title="{esc(tooltip(cell))}">{_milli(kl)}'

    widths = ", ".join(map(str, sorted({fmt for _, fmt in near4})))
    return (
        "<p>KL divergence when this module alone is rounded to the measured width nearest to 4 "
        f"bits ({widths or MISSING}), in thousandths of a nat per token, coloured by its "
        "logarithm. A cell&rsquo;s tooltip has every format; so has the table below.</p>"
        f"{_legend(scale)}{_table(grid, draw, 'Sensitivity of every module')}"
    )


def format_map(grid: Grid) -> str:
    """Colour and label: the chosen format."""

    def draw(cell: Cell) -> str:
        level = format_level(cell.format)
        return f'class="f{level}" title="{esc(tooltip(cell))}">{_short(cell.format)}'

    used = sorted({cell.format for cell in grid.cells})
    swatches = "".join(f'<li class="f{format_level(f)}">{_short(f)}</li>' for f in used)
    return (
        "<p>The format this plan gives each module: bits, then <q>g</q> and the number of weights "
        "that share a scale; nvfp4 has 4-bit floating point codes, bf16 is left unquantized. "
        "Colours run from few bits to many.</p>"
        f'<ul class="swatches">{swatches}</ul>{_table(grid, draw, "Format of every module")}'
    )


def bytes_per_format(grid: Grid, fixed_bytes: int) -> str:
    """Where the bytes go, as bars; their sum is the size of all tensors."""
    total = sum(cell.nbytes for cell in grid.cells) + fixed_bytes
    rows = []
    for fmt in sorted({cell.format for cell in grid.cells}):
        cells = [cell for cell in grid.cells if cell.format == fmt]
        rows.append(
            _bar_row(str(fmt), len(cells), sum(c.nbytes for c in cells), total, format_level(fmt))
        )
    if fixed_bytes:
        rows.append(_bar_row("norms, biases", None, fixed_bytes, total, None))
    return table(("format", "", "share", "bytes", "modules"), rows, "bars")


def _bar_row(
    label: str, modules: int | None, nbytes: int, total: int, level: int | None
) -> list[str]:
    share = nbytes / total
    css = "plain" if level is None else f"f{level}"
    return [
        label,
        f'<div class="bar {css}" style="width:{100 * share:.2f}%"></div>',
        f"{100 * share:.1f} %",
        data(nbytes, count(nbytes)),
        "" if modules is None else str(modules),
    ]


def module_table(grid: Grid) -> str:
    """Every module with every figure, KL in thousandths; the chosen format's score is marked."""
    menu = sorted({fmt for cell in grid.cells for fmt in cell.scores} - {DENSE})
    dense = [cell.scores[DENSE].kl for cell in grid.cells if DENSE in cell.scores]
    menu += [DENSE] if any(dense) else []
    head = "".join(f"<th>{fmt}</th>" for fmt in menu)
    rows = []
    for cell in grid.cells:
        scores = "".join(_score(cell, fmt) for fmt in menu)
        rows.append(
            f'<tr><th scope="row">{esc(cell.module.path)}</th>'
            f'<td data-label="role">{cell.module.role.value}</td>'
            f'<td data-label="shape">{shape(cell.module.shape)}</td>'
            f'<td data-label="format">{cell.format}</td>'
            f'<td data-label="bytes">{data(cell.nbytes, count(cell.nbytes))}</td>{scores}</tr>'
        )
    return (
        '<div class="scroll tall"><table class="figures modules"><thead><tr><th>module</th>'
        f"<th>role</th><th>shape</th><th>format</th><th>bytes</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _score(cell: Cell, fmt: Format) -> str:
    if fmt not in cell.scores:
        reason = "not measured" if fmt.fits(cell.module.shape) else "groups do not fit"
        return f'<td class="missing" title="{reason}" data-label="{fmt}">&ndash;</td>'
    kl, se = cell.scores[fmt].kl, cell.scores[fmt].se
    mark = ' class="chosen"' if fmt == cell.format else ""
    shown = data(kl, plus_minus(1000 * kl, 1000 * se if se else None).replace("± ", "±&nbsp;"))
    return f'<td{mark} data-label="{fmt}">{shown}</td>'


def tooltip(cell: Cell) -> str:
    """Plain text: path, role, shape, chosen format and the exact score of every format."""
    lines = [
        cell.module.path,
        f"{cell.module.role.value}, {shape(cell.module.shape)}",
        f"{cell.format}: {count(cell.nbytes)} bytes ({size(cell.nbytes)})",
        "KL in nats per token:",
    ]
    for fmt, score in sorted(cell.scores.items(), key=lambda item: item[0]):
        figure = f"{score.kl}" if score.se is None else f"{score.kl} ± {score.se}"
        lines.append(f"{fmt}  {figure}{'  ← chosen' if fmt == cell.format else ''}")
    return "\n".join(lines)


def _milli(kl: float) -> str:
    """Two digits, at most five characters: "0.43", "12", "<.01"."""
    m = 1000 * kl
    if 0 < m < 0.005:
        return "&lt;.01"
    return "0" if m == 0 else f"{m:.2f}" if m < 1 else f"{m:.1f}" if m < 10 else f"{m:.0f}"


def _short(fmt: Format) -> str:
    return f"{fmt.bits}<small>g{fmt.group_size}</small>" if fmt.mode == "affine" else str(fmt)


def _legend(scale: LogScale) -> str:
    swatches = "".join(f'<i class="k{level}"></i>' for level in range(LEVELS))
    ticks = (scale.low, sqrt(scale.low * scale.high), scale.high)
    marks = "".join(f"<span>{number(1000 * kl, 2)}</span>" for kl in ticks)
    return (
        f'<div class="legend"><div class="ramp">{swatches}</div><div class="marks">{marks}</div>'
        '<div class="marks"><span>robust</span><span>10⁻³ nats per token</span>'
        "<span>sensitive</span></div></div>"
    )


def _table(grid: Grid, draw: Draw, caption: str) -> str:
    columns = grid.columns
    groups = "".join(
        f'<th scope="colgroup" colspan="{len(leaves)}" title="{esc(parent)}">'
        f"{breakable(parent.rpartition('.')[2])}</th>"
        for parent, leaves in grid.groups
    )
    heads = "".join(
        f'<th scope="col" title="{esc(key)}">{breakable(leaf)}</th>'
        for _, leaves in grid.groups
        for key, leaf in leaves
    )
    body = []
    for row in grid.rows:
        label = f'<tr><th scope="row">{esc(row.label)}</th>'
        if row.single:
            body.append(
                f'{label}<td colspan="{max(1, len(columns))}" {draw(row.single)} '
                f"<span>{esc(row.single.module.path)}</span></td></tr>"
            )
            continue
        cells = (
            f"<td {draw(row.cells[key])}</td>" if key in row.cells else '<td class="none"></td>'
            for key in columns
        )
        body.append(f"{label}{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="map" style="--columns:{max(4, len(columns))}">'
        f'<caption class="hidden">{esc(caption)}</caption>'
        f"<thead><tr><th></th>{groups}</tr><tr><th>block</th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
