"""One self-contained HTML page about one conversion: no scripts, no fonts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError
from ..planning.plan import Plan
from ..planning.scores import Scores, TextInfo
from ..quality.answers import Answers
from . import compare, maps, measured, proposed
from .curve import Curve, trace
from .document import code, document, drawings, facts, known, pairs, table
from .layout import Grid, lay_out
from .text import MISSING, count, data, esc, number

_METHODS = {
    "kl": "One module at a time was rounded to one format, and the KL divergence this causes "
    "against the same module at full precision was averaged over the tokens of the calibration "
    "text.",
    "fisher": "Each score estimates, from one backward pass over the calibration text, the KL "
    "divergence that rounding one module to one format causes (Fisher information times squared "
    "rounding error).",
    "auto": "Each score estimates, from one backward pass over the calibration text, the KL "
    "divergence that rounding one module to one format causes; for experts and for routers that KL "
    "was measured with the one module rounded.",
}
_REFERENCES = {
    "bf16": "All other modules stayed unquantized.",
    "uniform4": "All other modules ran in uniform 4-bit, because the unquantized model did not fit "
    "in memory.",
}


def write(plan: Plan, scores: Scores, path: str | Path, samples: Sequence[Answers] = ()) -> None:
    """Write `conversion_page(plan, scores, samples)` to `path` as UTF-8."""
    write_page(Path(path), conversion_page(plan, scores, samples))


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8; raises ExportError."""
    try:
        path.expanduser().write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"the page {path} cannot be written ({error.strerror}); choose a writable folder"
        ) from error


def conversion_page(plan: Plan, scores: Scores, samples: Sequence[Answers] = ()) -> str:
    """The page about a plan and the scores it was made from, the answer first.

    Raises SensitivityError when the two are about different models.
    """
    grid = lay_out(plan, scores)
    ours, stock = compare.sides(plan, scores)
    return document(
        plan.model.name,
        "optiq report",
        f"""{compare.headline(ours, stock)}
</header>
{_curve(trace(plan, scores))}
<section>
<h2>Against stock uniform 4-bit</h2>
{compare.table(ours, stock)}
</section>
{_samples(samples)}
{proposed.section(plan.selection)}
{_maps(plan, grid)}
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


def _maps(plan: Plan, grid: Grid) -> str:
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
{maps.bytes_per_format(grid, plan.model.fixed_bytes)}
</section>
<section>
<h2>Formats measured</h2>
{measured.table(grid, plan.model.itemsize)}
</section>
{measured.routers(grid)}"""


def _curve(curve: Curve) -> str:
    figure = drawings(curve)
    if curve.unpredicted:
        widths = ", ".join(f"{bits}-bit" for bits in curve.unpredicted)
        figure += f"<p>Uniform {widths}: {MISSING}, some modules have no score at that width.</p>"
    return f"""<section>
<h2>KL against size</h2>
<p>The line is the lowest predicted KL at each size. Hollow marks are predicted, filled marks
measured on the whole model, with one standard error up and down.</p>
<figure>{figure}</figure>
</section>"""


def _samples(samples: Sequence[Answers]) -> str:
    """What the three models answer; empty where they were not asked."""
    if not samples:
        return ""
    rows = [
        [esc(s.prompt), *(f'<span class="answer">{esc(a)}</span>' for a in s.answers)]
        for s in samples
    ]
    head = ("asked", "unquantized", "this plan", "stock uniform 4-bit")
    return f"""<section>
<h2>Answers side by side</h2>
<p>The likeliest word each time, at most {max(s.tokens for s in samples)} tokens. A few answers
show what a KL looks like; they measure nothing.</p>
{table(head, rows, "answers")}
</section>"""


def _provenance(plan: Plan, scores: Scores) -> str:
    model, selection = plan.model, plan.selection
    rounding = known(selection and selection.rounding)
    rows = [
        ("Model", esc(model.name)),
        ("Fingerprint", code(model.fingerprint)),
        ("Type", f"{known(model.model_type)}, {known(model.dtype)}"),
        *(("Not as the original", esc(f"mlx-lm runs it {d}")) for d in model.departures),
        ("Budget", f"{esc(plan.asked)}: {count(plan.budget)} bytes"),
        ("Predicted KL", data(plan.predicted_kl)),
        ("Proven lower bound", data(plan.bound)),
        (
            "Gap to the bound",
            MISSING if plan.gap is None else data(plan.gap, f"{number(100 * plan.gap, 2)} %"),
        ),
        ("Reference", esc(scores.reference)),
        ("Method", esc(scores.method)),
        ("Rounding", f"{esc(scores.rounding)} (scores), {rounding} (weights)"),
        ("Tokens rounded with", known(selection and selection.rounding_tokens)),
        *_text(scores.calibration),
        ("Seed", f"{known(scores.calibration.seed)} (text), {known(plan.seed)} (plan)"),
        ("Seconds measuring", data(scores.seconds)),
        ("Command", code(plan.command or None)),
        ("Versions", pairs(plan.versions)),
        ("Machine", pairs(plan.machine)),
    ]
    if scores.versions != plan.versions:
        rows.append(("Versions, scores", pairs(scores.versions)))
    if scores.machine != plan.machine:
        rows.append(("Machine, scores", pairs(scores.machine)))
    return f"""<section>
<h2>How the numbers were made</h2>
{_notes(scores)}
{facts(rows)}
</section>"""


def _text(mix: TextInfo) -> list[tuple[str, str]]:
    """The rows about the text that was scored on."""
    return [
        ("Scores from", known(mix.source)),
        ("Tokens", known(mix.tokens)),
        ("Tokens per domain", pairs(mix.tokens_per_domain)),
        ("Sequences", known(mix.sequences)),
        ("Text sha256", code(mix.sha256)),
    ]


def _notes(scores: Scores) -> str:
    method = _METHODS.get(scores.method, "How the scores were made is not recorded.")
    reference = _REFERENCES.get(scores.reference, "")
    return f"""<p>KL divergence says how far the quantized model&rsquo;s next-token probabilities
are from the unquantized model&rsquo;s, in nats per token; zero means no change. {method}
{reference} Error bars are one standard error of the mean, with the tokens of one sequence not taken
as independent; the error of a difference takes the two sides as independent.</p>
<p>A predicted KL is the sum of the scores of the chosen formats. It assumes that the errors of
modules add up, so it ranks plans well and states a level less well; a measured KL comes from
running the whole quantized model. Bits per weight are eight times the bytes of all tensors
(scales, biases, norms and embeddings included) over the number of weights.</p>"""
