"""The page of `optiq kv`: formats of keys and values by cache, and sizes against KL."""

from __future__ import annotations

from typing import Any

from .curve import Curve, Point
from .document import code, document, drawings, facts, known, pairs
from .text import MISSING, count, data, data_se, esc, number, size

Json = dict[str, Any]

KICKER = "optiq kv"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again


def render(report: Json) -> str:
    """The page for the content of a kv_config.report.json."""
    return document(
        report["model"]["name"],
        KICKER,
        f"""<p>{_verdict(report)}</p>
</header>
<section>
<h2>KL against size</h2>
<p>The line is the lowest predicted KL at each size. Filled marks are measured on held-out text with
the whole cache quantized, one standard error up and down: a circle for the formats that were
chosen, squares for the same widths in all layers (keys/values). Sizes are those of all keys and
values after {count(report["context"])} tokens.</p>
<figure>{drawings(trace(report))}</figure>
{_points(report)}
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


def trace(report: Json) -> Curve:
    """The predicted frontier, and what was measured on held-out text."""
    points = [
        Point(
            p["name"],
            "plan" if p["name"] == "optiq" else "uniform",
            p["nbytes"],
            p["kl"]["mean"],
            p["kl"]["se"],
            True,
        )
        for p in report["points"]
    ]
    return Curve([(nbytes, kl) for nbytes, kl in report["frontier"]], points, [])


def _verdict(report: Json) -> str:
    ours, share = report["points"][0], report["nbytes"] / report["dense_nbytes"]
    return (
        f"Keys and values take {data(report['nbytes'], size(report['nbytes']))} after "
        f"{count(report['context'])} tokens, {number(100 * share)} % of 16 bits, and move the "
        f"next-token distribution by {data_se(ours['kl'])} nats per token."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _metrics(p: Json) -> tuple[str, ...]:
    return (
        esc(p["name"]),
        data(p["nbytes"], size(p["nbytes"])),
        data(p["predicted"]),
        data_se(p["kl"]),
        data(p["kl"]["p99"]),
        data_se(p["top1"], scale=100),
        data(p["ppl_ratio"], number(p["ppl_ratio"], 4)),
    )


_HEAD = ("", "size", "predicted KL", "KL ± se", "KL 99 %", "same top token, %", "perplexity ratio")


def _points(report: Json) -> str:
    return _table(_HEAD, [_metrics(p) for p in sorted(report["points"], key=lambda p: p["nbytes"])])


def _candidates(report: Json) -> str:
    text = (
        f"<p>Measured on other text, which neither scores nor the figures above saw; taken was "
        f"<em>{esc(report['chosen'])}</em>, the one of least KL. Measured over predicted KL of it: "
        f"{data(report['ratio'])}.</p>"
    )
    return text + _table(_HEAD, [_metrics(p) for p in report["candidates"]])


def _formats(report: Json) -> str:
    """One row per cache: what K and V got, and the scores of all formats, in 1/1000 nat."""
    columns = list(dict.fromkeys(f for row in report["scores"] for f in row["scores"]))
    rows = []
    for row in report["scores"]:
        cells = [
            data(row["scores"][f]["kl"], number(1000 * row["scores"][f]["kl"]))
            if f in row["scores"]
            else ""
            for f in columns
        ]
        shown = [
            f"<strong>{cell}</strong>" if f == row["format"] else cell
            for f, cell in zip(columns, cells, strict=True)
        ]
        name = f"{row['cache']} {'keys' if row['side'] == 'k' else 'values'}"
        rows.append((name, esc(row["format"]), *shown))
    return (
        "<p>KL in thousandths of a nat per token when this cache alone is in a format, read back "
        f"by the last {count(report['text']['tail'])} tokens of each context; the format that was "
        "taken is bold.</p>" + _table(("cache", "format", *map(esc, columns)), rows)
    )


def _provenance(report: Json) -> str:
    model, text, law, exact = report["model"], report["text"], report["law"], report["exact"]
    lengths = {
        name: f"{len(of)} contexts of {max(of)} tokens" for name, of in text["tokens"].items()
    }
    rows = [
        ("Model", esc(model["name"])),
        ("Fingerprint", code(model["fingerprint"])),
        ("Type", known(model["model_type"])),
        ("Budget", f"{known(report['budget']['asked'])}: {count(report['budget']['bytes'])} bytes"),
        ("Bytes per token", known(report["bytes_per_token"])),
        (
            "Exact tokens",
            f"last {known(exact['recent'])}, first {known(exact['sink'])}: "
            f"{count(exact['nbytes'])} bytes beside the budget",
        ),
        ("Text", known(text["source"])),
        *((f"Text, {name.replace('_', '-')}", known(of)) for name, of in lengths.items()),
        *((f"sha256, {name.replace('_', '-')}", code(of)) for name, of in text["sha256"].items()),
        ("Law over measured", f"{_law(law)}"),
        ("Seed", known(text["seed"])),
        ("Command", code(report["command"] or None)),
        ("Versions", pairs(report["versions"])),
        ("Machine", pairs(report["machine"])),
    ]
    return f"""<section>
<h2>How the numbers were made</h2>
<p>KL divergence says how far the next-token probabilities are from those with a cache in full
precision; zero is no change. Two formats of each cache were scored, the others follow from the law
that halving the step quarters the KL, which was checked where all were. Error bars take the tokens
of one context as dependent.</p>
{facts(rows)}
</section>"""


def _law(law: Json) -> str:
    if not law["checked"]:
        return MISSING
    return (
        f"{data(law['median'])} ({data(law['least'])} to {data(law['most'])}) in "
        f"{law['checked']} checks"
    )
