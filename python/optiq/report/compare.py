"""The plan against stock uniform 4-bit: the headline and the comparison table."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from typing import Any

from .layout import Grid, uniform
from .text import MISSING, TIMES, count, data, data_se, esc, finite, number, plus_minus, size

NATS = "nats per token"


@dataclass(frozen=True)
class Side:
    """One of the two models: its bytes, its measured metrics (maybe none) and its predicted KL."""

    nbytes: int | None
    bpw: float | None
    predicted: float | None
    measured: dict[str, Any]

    @property
    def kl(self) -> dict[str, Any]:
        return self.measured.get("kl") or {}

    @property
    def mean(self) -> float | None:
        return finite(self.kl.get("mean"))

    @property
    def se(self) -> float | None:
        return finite(self.kl.get("se"))


def sides(plan: dict[str, Any], scores: dict[str, Any], grid: Grid) -> tuple[Side, Side]:
    """(this plan, stock uniform 4-bit)."""
    stock = plan.get("uniform4") or {}
    # The scores predict stock uniform 4-bit only where they are those of stock rounding.
    predicted = None
    if scores.get("rounding") == "minmax":
        predicted = uniform(grid, 4, scores["model"]["itemsize"])
    nbytes = stock.get("nbytes")
    if nbytes is None and predicted:
        nbytes = predicted[0] + scores["model"]["fixed_bytes"]
    bpw = nbytes and plan["bpw"] * nbytes / plan["nbytes"]
    return (
        Side(
            plan["nbytes"],
            plan["bpw"],
            finite(plan["objective"]["predicted_kl"]),
            plan.get("measured") or {},
        ),
        Side(nbytes, bpw, predicted[1] if predicted else None, stock.get("measured") or {}),
    )


def headline(ours: Side, stock: Side) -> str:
    """Four figures, each over that of uniform 4-bit. Measured is never set against predicted."""
    if ours.mean is None:
        how, a, b = "Predicted", ours.predicted, stock.predicted
        kl, other = data(a), data(b)
    else:
        how, a, b = "Measured", ours.mean, stock.mean
        kl, other = data_se(ours.kl), data_se(stock.kl)
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
    if ours.mean is None:
        parts.append("The exported model was not measured; its KL is predicted, see the notes.")
    elif stock.mean is None:
        parts.append("Stock uniform 4-bit was not measured, so there is nothing to compare with.")
    elif ours.se is not None and stock.se is not None:
        gap = stock.mean - ours.mean
        error = hypot(ours.se, stock.se)
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


def table(ours: Side, stock: Side) -> str:
    """Every metric of both sides, one row each."""
    pair = (ours, stock)
    rows = [
        ("Bytes of all tensors", [data(s.nbytes, count(s.nbytes or 0)) for s in pair]),
        ("Bits per weight", [data(s.bpw) for s in pair]),
        ("KL, predicted sum", [data(s.predicted) for s in pair]),
        ("KL, mean ± se", [data_se(s.kl) for s in pair]),
    ]
    for key, label in (
        ("median", "median"),
        ("p95", "95th percentile"),
        ("p99", "99th percentile"),
        ("p999", "99.9th percentile"),
        ("max", "largest"),
    ):
        rows.append((f"KL, {label}", [data(s.kl.get(key)) for s in pair]))
    top1 = [data_se(s.measured.get("top1"), scale=100) for s in pair]
    rows.append(("Same top token, % ± se", top1))
    rows.append(("Perplexity ratio", [data(s.measured.get("ppl_ratio"), _ratio(s)) for s in pair]))
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr>' for name, (a, b) in rows
    )
    return (
        '<div class="scroll"><table class="figures compare"><thead><tr><th></th>'
        "<th>this plan</th><th>stock <span>uniform 4-bit</span></th></tr></thead>"
        f"<tbody>{body}</tbody></table></div><p>{_measured_on(ours, stock)}</p>"
    )


def _ratio(side: Side) -> str | None:
    ratio = finite(side.measured.get("ppl_ratio"))
    return None if ratio is None else f"{ratio:.4f}"


def _measured_on(ours: Side, stock: Side) -> str:
    """Which text the measured figures are from; a warning when the two sides differ in it."""
    texts = []
    for side, name in ((ours, "This plan"), (stock, "Stock uniform 4-bit")):
        m = side.measured
        if m:
            text = esc(str(m.get("text_sha256", "unknown"))[:12])
            tokens, sequences = (esc(m.get(key, "unknown")) for key in ("tokens", "sequences"))
            where = f"{tokens} tokens in {sequences} sequences, text <code>{text}</code>"
            texts.append((name, where))
        else:
            texts.append((name, MISSING))
    (a, where_a), (b, where_b) = texts
    if where_a == where_b and ours.measured:
        return f"KL in {NATS}, both measured on {where_a}."
    warn = (
        " <strong>Different texts: the two columns cannot be compared.</strong>"
        if ours.measured and stock.measured
        else ""
    )
    return f"KL in {NATS}. {a}: {where_a}. {b}: {where_b}.{warn}"
