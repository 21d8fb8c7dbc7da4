"""The page of `optiq compare --evals`: two models, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from ..report.document import document, table
from ..report.text import count, data, esc
from .comparison import Compared, Comparison

KICKER = "optiq compare --evals"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again

_HEAD = ("", "items", "A", "B", "B - A, 95 % interval", "only A", "only B", "p", "verdict")


def evals_page(found: Comparison, names: Sequence[str]) -> str:
    """The page about the models called `names`, A and B."""
    a, b = map(esc, names)
    rows = [_row(row.metric.label, row, row.p, row.metric.scale) for row in found.metrics]
    if whole := found.capability:
        rows.append(_row("Capability Score", whole, whole.paired.p, 100))
    notes = "".join(f"<p>{esc(note)}</p>" for note in found.notes)
    return document(
        f"{names[0]} and {names[1]}",
        KICKER,
        f"""<p>A is <bdi>{a}</bdi>, B is <bdi>{b}</bdi>. {_verdict(found)}</p>
</header>
<section>
<h2>Benchmarks</h2>
{table(_HEAD, rows, "verdicts")}
<p>Shares in percent, differences in points, paired by item. <em>Only A</em> and <em>only B</em>
count the items that one alone got right. p is after Holm&rsquo;s correction over the main metric
of {found.tests} {"benchmark" if found.tests == 1 else "benchmarks"}.</p>
{notes}
</section>""",
    )


def _verdict(found: Comparison) -> str:
    clear = [row for row in found.metrics if row.p is not None and row.p < 0.05]
    if not clear:
        return "No benchmark shows a difference between them."
    said = ", ".join(f"{esc(row.metric.label)}: {esc(row.verdict or '')}" for row in clear)
    return f"There are differences: {said}."


def _row(label: str, row: Compared, p: float | None, scale: float) -> list[str]:
    paired = row.paired
    change = _share(paired.difference, scale, sign="+")
    if isfinite(paired.low):
        low, high = (_share(limit, scale, sign="+") for limit in (paired.low, paired.high))
        change += f" ({low} to {high})"
    only = ["" if n is None else count(n) for n in (paired.only_first, paired.only_second)]
    return [
        esc(label),
        count(paired.n),
        *(data(side.value, _share(side.value, scale)) for side in (row.first, row.second)),
        data(paired.difference, change),
        *only,
        "" if p is None else data(p, f"{p:.2g}" if p >= 1e-4 else "&lt;0.0001"),
        esc(row.verdict or ""),
    ]


def _share(value: float, scale: float, sign: str = "") -> str:
    """A share in percent with one decimal; anything else in three digits."""
    if not isfinite(value):
        return "-"
    return f"{scale * value:{sign}.1f}" if scale == 100 else f"{value:{sign}.3g}"
