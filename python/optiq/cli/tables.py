"""Tables for the terminal."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from ..base.progress import duration
from ..base.text import folded
from ..formats import UNIFORM4

if TYPE_CHECKING:  # a plan is printed without MLX
    from ..cards import Card
    from ..evals.comparison import Compared, Comparison
    from ..kv.report import KVReport
    from ..planning.pareto import Frontier
    from ..planning.plan import Plan, Selection
    from ..planning.scores import Scores
    from ..quality.results import Mean, Measured
    from ..quantize.convert import Result


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is not one, and lines may be long."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def shell_lines(command: str, columns: int) -> str:
    """A command that fits, broken before options as a shell allows."""
    words = re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", command)
    parts = [words[0]]  # options with their values
    for word in words[1:]:
        if word.startswith("-"):
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > columns:
            lines.append("   ")
        lines[-1] += f" {part}"
    return " \\\n".join(lines)


def grid(rows: Sequence[Sequence[str]], *, words: int = 0) -> str:
    """Columns two spaces apart, right-aligned but for the first and the last `words` of them.

    Where the terminal is too narrow for them, each row is a paragraph with a line for each column.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    columns = terminal_width()
    if columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns:
        return _paragraphs(rows)
    left = {0, *range(len(widths) - words, len(widths))}
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _paragraphs(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    width = max(map(len, head))
    return "\n".join(
        "\n".join(
            [
                row[0],
                *(
                    f"  {name.ljust(width)}  {cell}"
                    for name, cell in zip(head[1:], row[1:], strict=True)
                    if cell
                ),
            ]
        )
        for row in body
    )


def facts_lines(rows: Sequence[tuple[str, str]]) -> str:
    """A name and a text on each line; on a terminal long texts go on below themselves."""
    columns, indent = terminal_width(), " " * 11
    lines = []
    for name, text in rows:
        line = name.ljust(11) + text
        if columns is not None and len(line) > columns and len(text.split()) > 1:
            line = "\n".join(
                textwrap.wrap(
                    line, columns, subsequent_indent=indent, break_long_words=False,
                    break_on_hyphens=False,
                )
            )  # fmt: skip
        lines.append(line)
    return "\n".join(lines)


def number(value: float | None, se: float | None = None) -> str:
    """A figure in four digits with its standard error, or a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if se is None else f"{value:.4g} ± {se:.2g}"


def _percent(top1: Mean) -> str:
    return f"{number(100 * top1.mean, top1.se and 100 * top1.se)} %"


def size(nbytes: int) -> str:
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:.2f} {name}"


def metrics_table(metrics: Mapping[str, Measured]) -> str:
    """One column per model, one row per metric; KL in nats per token."""
    columns, names = list(metrics.values()), list(metrics)
    legend: list[str] = []
    if terminal_width() is not None and sum(max(16, len(name)) + 2 for name in names) > 60:
        letters = ascii_uppercase[: len(names)]
        legend = [f"{letter}: {name}" for letter, name in zip(letters, names, strict=True)]
        names = list(letters)
    rows = [
        ["", *names],
        ["size", *(size(m.nbytes) for m in columns)],
        ["bits per weight", *(f"{m.bpw:.3f}" for m in columns)],
        ["KL mean", *(number(m.kl.mean, m.kl.se) for m in columns)],
        ["KL median", *(number(m.kl.median) for m in columns)],
        ["KL 95 %", *(number(m.kl.p95) for m in columns)],
        ["KL 99 %", *(number(m.kl.p99) for m in columns)],
        ["KL 99.9 %", *(number(m.kl.p999) for m in columns)],
        ["KL max", *(number(m.kl.max) for m in columns)],
        ["same top token", *(_percent(m.top1) for m in columns)],
        ["perplexity ratio", *(f"{m.ppl_ratio:.4f}" for m in columns)],
        ["tokens", *(str(m.tokens) for m in columns)],
    ]
    return "\n".join([*legend, *([""] if legend else []), grid(rows)])


def plan_table(plan: Plan) -> str:
    """What was planned, and if it was written and measured, how it compares."""
    count, nbytes = Counter[str](), Counter[str]()
    for module in plan.modules:
        count[str(module.format)] += 1
        nbytes[str(module.format)] += module.nbytes
    rows = [["format", "modules", "bytes"]]
    rows += [[fmt, str(count[fmt]), f"{nbytes[fmt]:,}"] for fmt in sorted(count)]
    lines = [
        ("size", f"{plan.nbytes:,} bytes, {plan.bpw:.3f} bits per weight"),
        (
            "budget",
            f"{plan.budget:,} bytes ({plan.asked}), {100 * plan.nbytes / plan.budget:.2f} % used",
        ),
        (
            "predicted",
            f"KL {number(plan.predicted_kl)} nats per token, "
            f"optimal within {100 * (plan.gap or 0):.2g} %",
        ),
    ]
    if plan.selection:
        lines.append(("chosen", _chosen(plan.selection)))
    shown = f"{grid(rows)}\n\n{facts_lines(lines)}"
    if plan.measured:
        both = {"optiq": plan.measured}
        if plan.uniform4 and plan.uniform4.measured:
            both["uniform 4-bit"] = plan.uniform4.measured
        shown += f"\n\n{metrics_table(both)}"
    return shown


def summary(result: Result, name: str) -> str:
    """The end of a conversion, for somebody who reads nothing else; `name` is the folder's."""
    plan = result.plan
    assert result.path is not None
    before = plan.dense_nbytes + plan.model.fixed_bytes
    towers = plan.model.tower_bytes
    lines = [
        ("size", f"{size(before)} before, {size(plan.nbytes)} now "
         f"({100 * plan.nbytes / before:.0f} %)"),
        *([("towers", f"{size(towers)} of vision and audio weights beside it")] if towers else []),
        ("quality", _quality(plan)),
        ("scores", scores_line(result.scores)),
        ("time", _took(result)),
        ("memory", f"{size(result.memory.peak)} at most; {size(result.memory.stated)} were stated"),
        ("model", str(result.path)),
        ("report", str(result.path / "optiq" / "report.html")),
    ]  # fmt: skip
    quoted = shlex.quote(name)
    following = after(
        f'optiq generate {quoted} -p "Why is the sky blue?"', f"optiq eval {quoted} --limit 20"
    )
    return f"{facts_lines(lines)}\n{following}"


def after(*commands: str) -> str:
    """What to run next, as the end of a command's output."""
    columns = terminal_width()
    shown = [c if columns is None else shell_lines(c, columns - 2) for c in commands]
    return "\n".join(["", "Next:", *("  " + c.replace("\n", "\n  ") for c in shown)])


def _took(result: Result) -> str:
    """The time of the whole, and of each phase that took a hundredth of it."""
    parts = [
        f"{name} {duration(seconds)}"
        for name, seconds in result.phases.items()
        if seconds >= result.seconds / 100
    ]
    expected = duration(sum(result.expected.values()))
    return f"{duration(result.seconds)} ({expected} were estimated): {', '.join(parts)}"


def _quality(plan: Plan) -> str:
    """KL of ours, and of stock uniform 4-bit with its size."""
    if plan.measured is None:
        return "KL was not measured, because memory does not hold the models to compare"
    ours = plan.measured.kl
    text = f"KL {number(ours.mean, ours.se)} nats per token"
    stock = plan.uniform4
    if stock is None or stock.measured is None:
        return text
    kl = stock.measured.kl
    same = abs(stock.nbytes / plan.nbytes - 1) < 0.01
    where = "of the same size" if same else f"({size(stock.nbytes)})"
    return f"{text}; stock uniform 4-bit {where}: {number(kl.mean, kl.se)}"


def _chosen(selection: Selection) -> str:
    """Which proposal it is, by which rounding, and how well its KL was predicted."""
    of = len({candidate.name for candidate in selection.candidates})
    parts = [f"plan {selection.chosen} {f'of {of} by measured KL' if of else 'unmeasured'}"]
    parts.append(f"rounding {selection.rounding}")
    if selection.ratio is not None:
        parts.append(f"measured / predicted {selection.ratio:.2f} as scored")
    return ", ".join(parts)


def frontier_table(frontier: Frontier) -> str:
    """One row per model by rising bytes, then what was left out."""
    rows = [["", "size", "bits", "KL mean", "/ uniform", "same top token"]]
    for p in frontier.points:
        kl, mark = p.measured.kl, " *" if p.dominated else ""
        figures = [size(p.nbytes), f"{p.measured.bpw:.3f}", number(kl.mean, kl.se)]
        ratio = number(p.uniform.ratio) if p.uniform else "-"
        rows.append([p.name + mark, *figures, ratio, _percent(p.measured.top1)])
    legend = folded(
        "bits: per weight. / uniform: KL over that of stock uniform widths at the same bytes; "
        "below 1 is better. *: another model is at least as small and as good.",
        sys.stdout,
    )
    notes = [folded(note, sys.stdout, "  ") for note in frontier.notes]
    return "\n".join([grid(rows), "", legend, *notes])


def evals_table(compared: Comparison, names: Sequence[str]) -> str:
    """One row per metric of two models' records, A and B; what the columns are, and notes."""
    head = ["", "items", "A", "B", "B - A", "only A", "only B", "p", ""]
    rows = [head]
    for row in compared.metrics:
        rows.append(_evals_row(row.metric.label, row, row.p, row.metric.scale))
    if whole := compared.capability:
        rows.append(_evals_row("Capability Score", whole, whole.paired.p, 100))
    models = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    legend = [
        "B - A with its 95 % interval, shares in points. only A, only B: items that one alone got "
        "right.",
        f"p: after Holm's correction over the main metric of {compared.tests} benchmarks.",
    ]
    return "\n".join([*models, "", grid(rows, words=1), "", *legend, *compared.notes])


def _evals_row(label: str, row: Compared, p: float | None, scale: float) -> list[str]:
    paired = row.paired
    scores = [share(side.value, scale) for side in (row.first, row.second)]
    change = share(paired.difference, scale, sign="+")
    if isfinite(paired.low):
        limits = (share(limit, scale, sign="+") for limit in (paired.low, paired.high))
        change += f" ({' to '.join(limits)})"
    only = ["" if n is None else str(n) for n in (paired.only_first, paired.only_second)]
    shown = "" if p is None else f"{p:.2g}" if p >= 1e-4 else "<0.0001"
    return [label, str(paired.n), *scores, change, *only, shown, row.verdict or ""]


def card_table(card: Card) -> str:
    """What a card says, what it lacks, and where it is."""
    facts, base = card.facts, card.facts.base
    rows, lacking, few = [], [], []
    for score in facts.scores:
        metric, found = score.metric, score.estimate
        if metric.main and score.too_few:
            few.append(f"{metric.task} ({found.n if found else 0} items)")
        elif metric.main and found:
            figures = (found.value, found.low, found.high)
            rows.append([metric.label, *(share(x, metric.scale) for x in figures)])
        elif metric.main:
            lacking.append(metric.task)
    lines = [grid([["", "score", "from", "to"], *rows]), ""] if rows else []
    said = [("base", base.hub_id or f"{base.name}, no hub id: --base-model")]
    if lacking:
        text = f"{', '.join(lacking)}: the card says so; optiq eval measures them"
        said.insert(0, ("lacking", text))
    if few:
        said.insert(0, ("too few", f"{', '.join(few)}: too few to tell"))
    said += [("licence", base.license or "not recorded: --license"), ("card", str(card.path))]
    return "\n".join([*lines, facts_lines(said)])


def share(value: float, scale: float, sign: str = "") -> str:
    """A share in percent, or points, with one decimal; anything else in three digits."""
    if not isfinite(value):
        return "-"
    return f"{scale * value:{sign}.1f}" if scale == 100 else f"{value:{sign}.3g}"


def kv_table(report: KVReport) -> str:
    """How many caches got what, and how it measures beside uniform widths."""
    count = {side: Counter(str(s.format) for s in report.scores if s.side == side) for side in "kv"}
    widths = sorted({*count["k"], *count["v"]})
    rows = [["format", "keys of", "values of"]]
    rows += [[fmt, str(count["k"][fmt]), str(count["v"][fmt])] for fmt in widths]
    points = [["held-out text", "size", "KL mean", "KL 99 %", "same top token", "perplexity ratio"]]
    for p in report.points:
        kl, top1 = p.divergence.kl, p.divergence.top1
        figures = [size(p.nbytes), number(kl.mean, kl.se), number(kl.p99)]
        points.append([p.name, *figures, _percent(top1), f"{p.divergence.ppl_ratio:.4f}"])
    exact = report.exact
    lines = [
        (
            "size",
            f"{report.nbytes:,} bytes after {report.context:,} tokens, "
            f"{100 * report.nbytes / report.dense_nbytes:.1f} % of 16 bits",
        ),
        ("budget", f"{report.budget:,} bytes ({report.asked})"),
        (
            "exact",
            f"last {exact.recent} and first {exact.sink} tokens, {exact.nbytes:,} bytes on top",
        ),
        (
            "chosen",
            f"{report.chosen}, of {len(report.candidates)} by measured KL"
            + (f", measured / predicted {report.ratio:.2f}" if report.ratio else ""),
        ),
    ]
    return f"{grid(rows)}\n\n{facts_lines(lines)}\n\n{grid(points)}"


def scores_table(scores: Scores, path: Path) -> str:
    """The most sensitive modules, and what was measured."""
    scored = [(m.module.path, m.scores[UNIFORM4]) for m in scores.modules if UNIFORM4 in m.scores]
    scored.sort(key=lambda pair: -pair[1].kl)
    rows = [[f"most sensitive at {UNIFORM4}", "KL (nats per token)"]]
    rows += [[path, number(score.kl, score.se)] for path, score in scored[:10]]
    return "\n".join(
        [
            grid(rows),
            "",
            facts_lines(
                [
                    ("modules", str(len(scores.modules))),
                    ("scores", scores_line(scores)),
                    ("written", str(path)),
                ]
            ),
        ]
    )


def scores_line(scores: Scores) -> str:
    """How scores were made, in one line."""
    text = scores.calibration
    return (
        f"method {scores.method}, reference {scores.reference}, {text.tokens} tokens of "
        f"{text.source} to score with, rounding {scores.rounding}"
    )
