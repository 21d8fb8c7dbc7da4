"""The page of `optiq frontier`: sizes against KL of many models, as a chart and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..planning.pareto import Frontier, Point
from .curve import Curve, Mark
from .document import code, document, drawings, facts, known, pairs, table
from .text import MISSING, TIMES, count, data, data_se, esc, number, size

KICKER = "optiq frontier"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again

_KINDS = {"ours": "plan", "uniform": "uniform", "recipe": "recipe"}


def frontier_page(frontier: Frontier) -> str:
    """The page for a frontier.json."""
    notes = "".join(f"<p>{esc(note)}</p>" for note in frontier.notes)
    return document(
        frontier.model.name,
        KICKER,
        f"""<p>{_verdict(frontier.points)}</p>
</header>
<section>
<h2>KL against size</h2>
<p>Circles: optiq at the size asked for. Squares: stock uniform widths in groups of 64. Triangles:
mlx-lm&rsquo;s mixed recipes. All are measured on the whole model, on the same held-out text, with
one standard error up and down. The grey line, straight in the logarithm of KL, is what uniform
widths are taken for at sizes between them.</p>
<figure>{drawings(trace(frontier.points))}</figure>
{notes}
</section>
<section>
<h2>Every model</h2>
{_table(frontier.points)}
</section>
{_provenance(frontier)}""",
    )


def trace(points: Sequence[Point]) -> Curve:
    """A mark for each point, with a line through ours and one through uniform widths."""
    marks = [Mark(p.name, _KINDS[p.family], p.nbytes, p.kl, p.measured.kl.se, True) for p in points]
    ours, uniform = (
        [(m.nbytes, m.kl) for m in marks if m.kind == kind] for kind in ("plan", "uniform")
    )
    return Curve(ours, marks, uniform=uniform)


def _verdict(points: Sequence[Point]) -> str:
    ratios = [p.uniform.ratio for p in points if p.family == "ours" and p.uniform]
    if not ratios:
        return "No size of ours lies where uniform widths were measured."
    low, high = data(min(ratios)), data(max(ratios))
    between = low if len(ratios) == 1 else f"between {low} and {high}"
    return (
        f"At equal bytes the KL of optiq is {between} {TIMES} that of stock uniform widths; "
        "below 1 is better."
    )


_HEAD = ("model", "size", "bits per weight", "KL ± se", "over uniform", "same top token, % ± se",
         "perplexity ratio")  # fmt: skip


def _table(points: Sequence[Point]) -> str:
    return (
        table(_HEAD, map(_row, points), "points")
        + "<p>KL in nats per token. <em>Over uniform</em> is the KL over that of uniform widths at "
        "the same bytes; of a model smaller than the smallest of them, over that one&rsquo;s. A "
        "dominated model is beaten by another that is at most as large and at least as good.</p>"
    )


def _row(p: Point) -> list[str]:
    m = p.measured
    ratio = data(p.uniform.ratio) if p.uniform else "" if p.family == "uniform" else MISSING
    formats = ", ".join(f"{fmt}: {n}" for fmt, n in p.formats.items())
    mark = ' <small class="dominated">dominated</small>' if p.dominated else ""
    return [
        f'<span title="{esc(formats)}">{esc(p.name)}</span>{mark}',
        data(m.nbytes, size(m.nbytes)),
        data(m.bpw),
        data_se(m.kl),
        ratio,
        data_se(m.top1, scale=100),
        data(m.ppl_ratio, number(m.ppl_ratio, 4)),
    ]


def _provenance(frontier: Frontier) -> str:
    model, mix, held_out = frontier.model, frontier.calibration, frontier.points[0].measured
    rows = [
        ("Model", esc(model.name)),
        ("Fingerprint", code(model.fingerprint)),
        ("Type", f"{known(model.model_type)}, {known(model.dtype)}"),
        ("Scores", pairs(asdict(frontier.scores))),
        ("Rounding of ours", known(frontier.rounding)),
        ("Calibration", f"{known(mix.tokens)} tokens of {known(mix.source)}"),
        ("Plans chosen on", f"{count(frontier.selection.tokens)} other tokens"),
        (
            "Measured on",
            f"{count(held_out.tokens)} held-out tokens in {held_out.sequences} sequences, "
            f"text {code(held_out.text_sha256)}",
        ),
        ("Seed", known(frontier.seed)),
        ("Command", code(frontier.command or None)),
        ("Versions", pairs(frontier.versions)),
        ("Machine", pairs(frontier.machine)),
    ]
    return f"""<section>
<h2>How the numbers were made</h2>
<p>KL divergence says how far the quantized model&rsquo;s next-token probabilities are from the
unquantized model&rsquo;s; zero means no change. Error bars are one standard error of the mean, with
the tokens of one sequence not taken as independent. Sizes count all tensors: scales, biases, norms
and embeddings included.</p>
{facts(rows)}
</section>"""
