"""The page of `optiq kv`: formats of keys and values by cache, and sizes against KL."""

from __future__ import annotations

from collections.abc import Iterable

from ..formats import Format
from ..kv.report import KVPoint, KVReport, Law
from .curve import Curve, Mark
from .document import code, document, drawings, facts, known, pairs, table
from .text import MISSING, count, data, data_se, esc, number, size

USUAL = (0.25, 4.0)  # measured over predicted KL; outside, a line of predictions misleads
KICKER = "optiq kv"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again


def kv_page(report: KVReport) -> str:
    """The page for a kv_config.report.json."""
    return document(
        report.model.name or "a model",
        KICKER,
        f"""<p>{_verdict(report)}</p>
</header>
<section>
<h2>KL against size</h2>
<p>{_line(report)} Filled marks are measured on held-out text with
the whole cache quantized, one standard error up and down: a circle for the formats that were
chosen, squares for the same widths in all layers (keys/values). Sizes are those of all keys and
values after {count(report.context)} tokens.</p>
<figure>{drawings(trace(report))}</figure>
{_measured(sorted(report.points, key=lambda p: p.nbytes))}
</section>
<section>
<h2>Formats</h2>
{_formats(report)}
</section>
<section>
<h2>Proposals</h2>
{_candidates(report)}
</section>
{_provenance(report)}""",
    )


def _line(report: KVReport) -> str:
    if _predicts(report):
        return "The line is the lowest predicted KL at each size."
    return (
        "No line is drawn: here the predicted KL, a sum of scores, is far from the measured one. "
        "It still ranks the formats."
    )


def trace(report: KVReport) -> Curve:
    """The predicted frontier, and what was measured on held-out text."""
    ours, *others = report.points
    marks = [
        Mark(p.name, "plan" if p is ours else "uniform", p.nbytes, p.kl, p.divergence.kl.se, True)
        for p in (ours, *others)
    ]
    line = list(report.frontier) if _predicts(report) else []
    return Curve(line, marks, across="size of keys and values")


def _predicts(report: KVReport) -> bool:
    """Whether the sums of scores are near enough to what was measured to stand beside it."""
    low, high = USUAL
    pairs = [(p.predicted, p.kl) for p in report.points if p.predicted]
    return all(low <= kl / predicted <= high for predicted, kl in pairs)


def _verdict(report: KVReport) -> str:
    share = report.nbytes / report.dense_nbytes
    return (
        f"Keys and values take {data(report.nbytes, size(report.nbytes))} after "
        f"{count(report.context)} tokens, {number(100 * share)} % of 16 bits, and move the "
        f"next-token distribution by {data_se(report.points[0].divergence.kl)} nats per token."
    )


_HEAD = ("", "size", "predicted KL", "KL ± se", "KL 99 %", "same top token, %", "perplexity ratio")


def _measured(points: Iterable[KVPoint]) -> str:
    return table(_HEAD, [_metrics(p) for p in points])


def _metrics(p: KVPoint) -> tuple[str, ...]:
    m = p.divergence
    return (
        esc(p.name),
        data(p.nbytes, size(p.nbytes)),
        data(p.predicted),
        data_se(m.kl),
        data(m.kl.p99),
        data_se(m.top1, scale=100),
        data(m.ppl_ratio, number(m.ppl_ratio, 4)),
    )


def _candidates(report: KVReport) -> str:
    text = (
        f"<p>Measured on other text, which neither scores nor the figures above saw; taken was "
        f"<em>{esc(report.chosen)}</em>, the one of least KL. Measured over predicted KL of it: "
        f"{data(report.ratio)}.</p>"
    )
    return text + _measured(report.candidates)


def _formats(report: KVReport) -> str:
    """One row per cache: what K and V got, and the scores of all formats, in 1/1000 nat."""
    columns = sorted({fmt for slot in report.scores for fmt in slot.scores}, key=_width)
    rows = []
    for slot in report.scores:
        cells = []
        for fmt in columns:
            score = slot.scores.get(fmt)
            cell = data(score.kl, number(1000 * score.kl)) if score else ""
            cells.append(f"<strong>{cell}</strong>" if fmt == slot.format else cell)
        name = f"{slot.cache} {'keys' if slot.side == 'k' else 'values'}"
        rows.append((name, str(slot.format), *cells))
    return (
        "<p>KL in thousandths of a nat per token when this cache alone is in a format, read back "
        f"by the last {count(report.text.tail)} tokens of each context; the format that was "
        "taken is bold.</p>" + table(("cache", "format", *map(str, columns)), rows)
    )


def _width(fmt: Format) -> tuple[int, int]:
    """Narrow formats first; of one width, those with larger groups."""
    return fmt.bits, -fmt.group_size


def _provenance(report: KVReport) -> str:
    model, text, exact = report.model, report.text, report.exact
    lengths = {name: f"{len(of)} contexts of {max(of)} tokens" for name, of in text.tokens.items()}
    rows = [
        ("Model", esc(model.name)),
        ("Fingerprint", code(model.fingerprint)),
        ("Type", known(model.model_type)),
        ("Budget", f"{esc(report.asked)}: {count(report.budget)} bytes"),
        ("Bytes per token", known(report.bytes_per_token)),
        (
            "Exact tokens",
            f"last {known(exact.recent)}, first {known(exact.sink)}: "
            f"{count(exact.nbytes)} bytes beside the budget",
        ),
        ("Text", known(text.source)),
        *((f"Text, {name.replace('_', '-')}", known(of)) for name, of in lengths.items()),
        *((f"sha256, {name.replace('_', '-')}", code(of)) for name, of in text.sha256.items()),
        ("Law over measured", _law(report.law)),
        ("Seed", known(text.seed)),
        ("Command", code(report.command or None)),
        ("Versions", pairs(report.versions)),
        ("Machine", pairs(report.machine)),
    ]
    return f"""<section>
<h2>How the numbers were made</h2>
<p>KL divergence says how far the next-token probabilities are from those with a cache in full
precision; zero means no change. Two formats of each cache were scored, the others follow from the
law that halving the step quarters the KL, which was checked where all were. Error bars take the
tokens of one context as dependent; one context alone gives none.</p>
{facts(rows)}
</section>"""


def _law(law: Law) -> str:
    if not law.checked:
        return MISSING
    return f"{data(law.median)} ({data(law.least)} to {data(law.most)}) in {law.checked} checks"
