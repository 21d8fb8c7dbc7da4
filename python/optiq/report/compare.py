"""The plan against stock uniform 4-bit: the headline and the comparison table."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from ..formats import UNIFORM4
from ..planning.plan import Plan
from ..planning.prediction import uniform
from ..planning.scores import Scores
from ..quality.results import Distribution, Measured
from .document import table as figures
from .text import MISSING, TIMES, UNKNOWN, count, data, data_se, esc, number, plus_minus, size

NATS = "nats per token"


@dataclass(frozen=True)
class Side:
    """One of the two models: its bytes, its predicted KL and what was measured; None is unknown."""

    nbytes: int | None
    bpw: float | None
    predicted: float | None
    measured: Measured | None

    @property
    def kl(self) -> Distribution | None:
        return self.measured.kl if self.measured else None


def sides(plan: Plan, scores: Scores) -> tuple[Side, Side]:
    """(this plan, stock uniform 4-bit)."""
    stock = plan.uniform4
    # The scores predict stock uniform 4-bit only where they are those of stock rounding.
    predicted = uniform(scores, UNIFORM4) if scores.rounding == "minmax" else None
    known = stock or predicted
    nbytes = known.nbytes if known else None
    bpw = plan.bpw * nbytes / plan.nbytes if nbytes else None
    return (
        Side(plan.nbytes, plan.bpw, plan.predicted_kl, plan.measured),
        Side(nbytes, bpw, predicted.kl if predicted else None, stock.measured if stock else None),
    )


def headline(ours: Side, stock: Side) -> str:
    """Four figures, each over that of uniform 4-bit. Measured is never set against predicted."""
    if ours.kl is None:
        how, kl, other = "Predicted", data(ours.predicted), data(stock.predicted)
        a, b = ours.predicted, stock.predicted
    else:
        how, kl, other = "Measured", data_se(ours.kl), data_se(stock.kl)
        a, b = ours.kl.mean, stock.kl.mean if stock.kl else None
    ratio = data(b / a, f"{number(b / a)} {TIMES}") if a and b is not None else MISSING
    of_ratio = "KL of uniform 4-bit over KL of this plan"
    tiles = [
        (
            "Size",
            data(ours.nbytes, size(ours.nbytes or 0)),
            f"uniform 4-bit: {data(stock.nbytes, size(stock.nbytes or 0))}",
        ),
        ("Bits per weight", data(ours.bpw), f"uniform 4-bit: {data(stock.bpw)}"),
        (
            f"{how} KL, nats/token",
            kl.replace(" ± ", " <small>± ", 1) + "</small>" * (" ± " in kl),
            f"uniform 4-bit: {other}",
        ),
        ("Ratio", ratio, of_ratio),
    ]
    cells = (
        f"<div><dt>{term}</dt><dd>{value}</dd><dd><small>{under}</small></dd></div>"
        for term, value, under in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl><p>{_verdict(ours, stock)}</p>'


def _verdict(ours: Side, stock: Side) -> str:
    """Plain sentences: at which bytes, and whether the difference is larger than its error."""
    parts = []
    if ours.nbytes and stock.nbytes:
        off = 100 * (ours.nbytes / stock.nbytes - 1)
        if abs(off) <= 1:
            parts.append(f"Both take the same bytes, within {max(abs(off), 0.01):.2f} %.")
        else:
            word = "more" if off > 0 else "fewer"
            parts.append(
                f"The sizes differ: this plan takes {abs(off):.1f} % {word} bytes than stock "
                "uniform 4-bit, so the two KL figures are not for the same size."
            )
    if ours.kl is None:
        parts.append("The exported model was not measured; its KL is predicted, see the notes.")
    elif stock.kl is None:
        parts.append("Stock uniform 4-bit was not measured, so there is nothing to compare with.")
    elif ours.kl.se is not None and stock.kl.se is not None:
        gap = stock.kl.mean - ours.kl.mean
        error = hypot(ours.kl.se, stock.kl.se)
        than = "lower than" if gap > 0 else "higher than"
        clear = (
            "a difference of more than two standard errors"
            if abs(gap) > 2 * error
            else "a difference within two standard errors, so neither is shown to be better"
        )
        parts.append(
            f"The KL of this plan is {plus_minus(abs(gap), error)} {NATS} {than} that of uniform "
            f"4-bit, {clear}."
        )
    return " ".join(parts)


_ROWS = (
    "Bytes of all tensors",
    "Bits per weight",
    "KL, predicted sum",
    "KL, mean ± se",
    "KL, median",
    "KL, 95th percentile",
    "KL, 99th percentile",
    "KL, 99.9th percentile",
    "KL, largest",
    "Same top token, % ± se",
    "Perplexity ratio",
)


def table(ours: Side, stock: Side) -> str:
    """Every metric of both sides, one row each."""
    rows = zip(_ROWS, _column(ours), _column(stock), strict=True)
    head = ("", "this plan", "stock <span>uniform 4-bit</span>")
    return f"{figures(head, rows, 'compare')}<p>{_measured_on(ours, stock)}</p>"


def _column(side: Side) -> list[str]:
    """The figures of one side, in the order of `_ROWS`."""
    known = [data(side.nbytes, count(side.nbytes or 0)), data(side.bpw), data(side.predicted)]
    m = side.measured
    if m is None:
        return known + [MISSING] * (len(_ROWS) - len(known))
    return [
        *known,
        data_se(m.kl),
        *map(data, (m.kl.median, m.kl.p95, m.kl.p99, m.kl.p999, m.kl.max)),
        data_se(m.top1, scale=100),
        data(m.ppl_ratio, f"{m.ppl_ratio:.4f}"),
    ]


def _measured_on(ours: Side, stock: Side) -> str:
    """Which text the measured figures are from; a warning when the two sides differ in it."""
    a, b = _text_of(ours.measured), _text_of(stock.measured)
    if a == b and ours.measured:
        return f"KL in {NATS}, both measured on {a}."
    warn = (
        " <strong>Different texts: the two columns cannot be compared.</strong>"
        if ours.measured and stock.measured
        else ""
    )
    return f"KL in {NATS}. This plan: {a}. Stock uniform 4-bit: {b}.{warn}"


def _text_of(m: Measured | None) -> str:
    if m is None:
        return MISSING
    text = UNKNOWN if m.text_sha256 is None else f"<code>{esc(m.text_sha256[:12])}</code>"
    return f"{m.tokens} tokens in {m.sequences} sequences, text {text}"
