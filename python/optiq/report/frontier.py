"""The page of `optiq frontier`: sizes against KL of many models, as a chart and as a table."""

from __future__ import annotations

from typing import Any

from .curve import Curve, Point
from .document import code, document, drawings, facts, known, pairs
from .text import MISSING, TIMES, count, data, data_se, esc, number, size

KICKER = "optiq frontier"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again

_KINDS = {"ours": "plan", "uniform": "uniform", "recipe": "recipe"}


def render(result: dict[str, Any]) -> str:
    """The page for a parsed frontier.json."""
    notes = "".join(f"<p>{esc(note)}</p>" for note in result["notes"])
    return document(
        result["model"]["name"],
        KICKER,
        f"""<p>{_verdict(result["points"])}</p>
</header>
<section>
<h2>KL against size</h2>
<p>Circles: optiq at the size asked for. Squares: stock uniform widths in groups of 64. Triangles:
mlx-lm&rsquo;s mixed recipes. All are measured on the whole model, on the same held-out text, with
one standard error up and down. The grey line, straight in the logarithm of KL, is what uniform
widths are taken for at sizes between them.</p>
<figure>{drawings(trace(result))}</figure>
{notes}
</section>
<section>
<h2>Every model</h2>
{_table(result["points"])}
</section>
{_provenance(result)}""",
    )


def trace(result: dict[str, Any]) -> Curve:
    """The points of frontier.json, with a line through ours and one through uniform widths."""
    points = [
        Point(p["name"], _KINDS[p["family"]], p["nbytes"], p["kl"]["mean"], p["kl"]["se"], True)
        for p in result["points"]
    ]
    ours, uniform = (
        [(p.nbytes, p.kl) for p in points if p.kind == kind] for kind in ("plan", "uniform")
    )
    return Curve(ours, points, [], uniform)


def _verdict(points: list[dict[str, Any]]) -> str:
    ratios = [p["uniform"]["ratio"] for p in points if p["family"] == "ours" and p["uniform"]]
    if not ratios:
        return "No size of ours lies where uniform widths were measured."
    low, high = data(min(ratios)), data(max(ratios))
    between = low if len(ratios) == 1 else f"between {low} and {high}"
    return (
        f"At equal bytes the KL of optiq is {between} {TIMES} that of stock uniform widths; "
        "below 1 is better."
    )


def _table(points: list[dict[str, Any]]) -> str:
    head = "".join(
        f"<th>{title}</th>"
        for title in (
            "model", "size", "bits per weight", "KL ± se", "over uniform", "same top token, % ± se",
            "perplexity ratio", "",
        )
    )  # fmt: skip
    rows = "".join(_row(p) for p in points)
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        "<p>KL in nats per token. <em>Over uniform</em> is the KL over that of uniform widths at "
        "the same bytes; of a model smaller than the smallest of them, over that one&rsquo;s. A "
        "dominated model is beaten by another that is no larger and no worse.</p>"
    )


def _row(p: dict[str, Any]) -> str:
    against = p["uniform"]
    ratio = data(against["ratio"]) if against else "" if p["family"] == "uniform" else MISSING
    formats = ", ".join(f"{fmt}: {n}" for fmt, n in p["formats"].items())
    cells = (
        data(p["nbytes"], size(p["nbytes"])),
        data(p["bpw"]),
        data_se(p["kl"]),
        ratio,
        data_se(p["top1"], scale=100),
        data(p["ppl_ratio"], number(p["ppl_ratio"], 4)),
        "dominated" if p["dominated"] else "",
    )
    css = ' class="dominated"' if p["dominated"] else ""
    return (
        f'<tr{css} title="{esc(formats)}"><th scope="row">{esc(p["name"])}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _provenance(result: dict[str, Any]) -> str:
    model, mix, held_out = result["model"], result["calibration"], result["points"][0]
    rows = [
        ("Model", esc(model["name"])),
        ("Fingerprint", code(model["fingerprint"])),
        ("Type", f"{known(model['model_type'])}, {known(model['dtype'])}"),
        ("Scores", pairs(result["scores"])),
        ("Rounding of ours", known(result["rounding"])),
        ("Calibration", f"{known(mix['tokens'])} tokens of {known(mix['source'])}"),
        ("Plans chosen on", f"{count(result['selection']['tokens'])} other tokens"),
        (
            "Measured on",
            f"{count(held_out['tokens'])} held-out tokens in {held_out['sequences']} sequences, "
            f"text {code(held_out['text_sha256'])}",
        ),
        ("Seed", known(result["seed"])),
        ("Command", code(result["command"] or None)),
        ("Versions", pairs(result["versions"])),
        ("Machine", pairs(result["machine"])),
    ]
    return f"""<section>
<h2>How the numbers were made</h2>
<p>KL divergence says how far the quantized model&rsquo;s next-token probabilities are from the
unquantized model&rsquo;s; zero is no change. Error bars are one standard error of the mean, with
the tokens of one sequence not taken as independent. Sizes count all tensors: scales, biases, norms
and embeddings included.</p>
{facts(rows)}
</section>"""
