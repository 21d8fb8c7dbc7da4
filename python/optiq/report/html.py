"""One self-contained HTML page about one conversion: no scripts, no fonts, nothing fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ExportError
from . import compare, maps, measured, proposed
from .curve import trace
from .document import code, document, drawings, facts, known, pairs
from .layout import Grid, lay_out
from .text import MISSING, count, data, esc, finite, number

_METHODS = {
    "kl": "One module at a time was rounded to one format, and the KL divergence this causes "
    "against the same module at full precision was averaged over the tokens of the calibration "
    "text.",
    "fisher": "Each score estimates, from one backward pass over the calibration text, the KL "
    "divergence that rounding one module to one format causes (Fisher information times squared "
    "rounding error).",
    "auto": "Each score estimates, from one backward pass over the calibration text, the KL "
    "divergence that rounding one module to one format causes; for experts, for routers and where "
    "the plan hangs on it, that KL was measured with the one module rounded.",
}
_REFERENCES = {
    "bf16": "All other modules stayed unquantized.",
    "uniform4": "All other modules ran in uniform 4-bit, because the unquantized model did not fit "
    "in memory.",
}


def write(plan: dict[str, Any], scores: dict[str, Any], path: str | Path) -> None:
    """Write `render(plan, scores)` to `path` as UTF-8."""
    page = render(plan, scores)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"the report {path} cannot be written ({error.strerror}); choose a writable folder"
        ) from error


def render(plan: dict[str, Any], scores: dict[str, Any]) -> str:
    """The page for a parsed plan.json and the sensitivity.json it was made from.

    Raises SensitivityError when the two are about different models.
    """
    grid = lay_out(plan, scores)
    ours, stock = compare.sides(plan, scores, grid)
    return document(
        plan["model"]["name"],
        "optiq report",
        f"""{compare.headline(ours, stock)}
</header>
<section>
<h2>Against stock uniform 4-bit</h2>
{compare.table(ours, stock)}
</section>
{proposed.section(plan)}
{_maps(plan, grid)}
{_curve(plan, scores, grid)}
<section>
<h2>Every module</h2>
<details>
<summary>{len(grid.cells)} modules: KL ± standard error of every format,
in thousandths of a nat per token</summary>
{maps.module_table(grid)}
</details>
</section>
{_provenance(plan, scores)}""",
    )


def _maps(plan: dict[str, Any], grid: Grid) -> str:
    fixed = plan["nbytes"] - sum(cell.nbytes for cell in grid.cells)
    basis = f'style="--columns:{max(4, len(grid.columns))}"'
    return f"""<div class="pair">
<section {basis}>
<h2>Sensitivity</h2>
{maps.sensitivity_map(grid)}
</section>
<section {basis}>
<h2>Formats</h2>
{maps.format_map(grid)}
</section>
</div>
<section>
<h2>Bytes per format</h2>
{maps.bytes_per_format(grid, fixed)}
</section>
<section>
<h2>Formats measured</h2>
{measured.table(grid, plan["model"]["itemsize"])}
</section>"""


def _curve(plan: dict[str, Any], scores: dict[str, Any], grid: Grid) -> str:
    curve = trace(plan, scores, grid)
    figure = drawings(curve)
    if not curve.frontier:
        figure += f"<p>Frontier: {MISSING}, some modules have no score.</p>"
    if curve.unpredicted:
        widths = ", ".join(f"{bits}-bit" for bits in curve.unpredicted)
        figure += f"<p>Uniform {widths}: {MISSING}, some modules have no score at that width.</p>"
    return f"""<section>
<h2>KL against size</h2>
<p>The line is the lowest predicted KL at each size. Hollow marks are predicted, filled marks
measured on the whole model, with one standard error up and down.</p>
<figure>{figure}</figure>
</section>"""


def _provenance(plan: dict[str, Any], scores: dict[str, Any]) -> str:
    model, objective, budget = plan["model"], plan["objective"], plan["budget"]
    mix, selection = scores.get("calibration") or {}, plan.get("selection") or {}
    rounding = scores.get("rounding")
    domains = mix.get("tokens_per_domain") or {}
    gap = finite(objective["gap"])
    rows = [
        ("Model", esc(model["name"])),
        ("Fingerprint", code(model["fingerprint"])),
        ("Type", f"{known(model['model_type'])}, {known(model['dtype'])}"),
        ("Budget", f"{known(budget['asked'])}: {count(budget['bytes'])} bytes"),
        ("Predicted KL", data(objective["predicted_kl"])),
        ("Proven lower bound", data(objective["bound"])),
        ("Gap to the bound", data(gap, f"{number(100 * gap, 2)} %" if gap is not None else None)),
        ("Reference", known(scores.get("reference"))),
        ("Method", known(scores.get("method"))),
        ("Rounding", f"{known(rounding)} (scores), {known(selection.get('rounding'))} (weights)"),
        ("Tokens rounded with", known(selection.get("rounding_tokens"))),
        ("Scores from", known(mix.get("source"))),
        ("Tokens", known(mix.get("tokens"))),
        ("Tokens per domain", pairs(domains)),
        ("Sequences", known(mix.get("sequences"))),
        ("Text sha256", code(mix.get("sha256"))),
        ("Seed", f"{known(mix.get('seed'))} (text), {known(plan.get('seed'))} (plan)"),
        ("Seconds measuring", data(scores.get("seconds"))),
        ("Command", code(plan.get("command") or None)),
        ("Versions", pairs(plan.get("versions"))),
        ("Machine", pairs(plan.get("machine"))),
    ]
    for key in ("versions", "machine"):
        if scores.get(key) != plan.get(key):
            rows.append((f"{key.capitalize()}, scores", pairs(scores.get(key))))
    return f"""<section>
<h2>How the numbers were made</h2>
{_notes(scores)}
{facts(rows)}
</section>"""


def _notes(scores: dict[str, Any]) -> str:
    method = _METHODS.get(str(scores.get("method")), "How the scores were made is not recorded.")
    reference = _REFERENCES.get(str(scores.get("reference")), "")
    return f"""<p>KL divergence says how far the quantized model&rsquo;s next-token probabilities
are from the unquantized model&rsquo;s, in nats per token; zero is no change. {method} {reference}
Error bars are one standard error of the mean, with the tokens of one sequence not taken as
independent; the error of a difference takes the two sides as independent.</p>
<p>A predicted KL is the sum of the scores of the chosen formats. It assumes that the errors of
modules add up, so it ranks plans well and states a level less well; a measured KL comes from
running the whole quantized model. Bits per weight are eight times the bytes of all tensors
(scales, biases, norms and embeddings included) over the number of weights.</p>"""
