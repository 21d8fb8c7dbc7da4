"""The plans that were proposed, what each was measured to lose, and the one that was taken."""

from __future__ import annotations

from ..planning.plan import Candidate, Selection
from .document import table
from .text import MISSING, UNKNOWN, count, data, data_se, esc, number

_WHAT = {
    "scores": "least predicted KL",
    "smooth": "scores with their noise averaged away",
    "wide": "no format below 4 bits",
    "uniform": "the widest format that fits for all modules",
}


def section(selection: Selection | None) -> str:
    """The section about what a plan was chosen from; empty where it was only made from scores."""
    if selection is None:
        return ""
    body = _table(selection) if selection.candidates else _untested(selection)
    return f"<section>\n<h2>Plans compared</h2>\n{body}\n</section>"


def _untested(selection: Selection) -> str:
    return (
        f"<p>The plan <em>{esc(selection.chosen)}</em> was taken, {MISSING} against others: "
        "there was no text to choose by, or no memory for the model beside its source.</p>"
    )


def _table(selection: Selection) -> str:
    head = ("plan", "rounding", "bytes", "predicted KL", "measured KL ± se", "")
    chosen = selection.chosen, selection.rounding
    rows = [_row(c, (c.name, c.rounding) == chosen) for c in selection.candidates]
    text = selection.text_sha256
    where = f"text <code>{esc(text[:12])}</code>" if text else UNKNOWN
    return (
        "<p>A sum of scores ranks plans well but not perfectly, so several plans of the size were "
        "rounded and run, and the one of least measured KL was taken: the mean over "
        f"{selection.tokens} tokens in {selection.sequences} sequences "
        f"({where}) that no score and no rounding was made from, in nats per token.</p>"
        f"{table(head, rows)}{_trust(selection)}"
    )


def _trust(selection: Selection) -> str:
    """How well the scores foretold what was measured, as far as it is known."""
    ratio, rank = selection.ratio, selection.rank_correlation
    said = []
    if ratio is not None:
        said.append(
            "With the rounding of the scores, the measured KL of the plan that was taken was "
            f"{data(ratio)} times the predicted one."
        )
    if rank is not None:
        said.append(
            f"The rank correlation of predicted and measured KL is {data(rank, number(rank, 2))}."
        )
    return f"<p>{' '.join(said)}</p>" if said else ""


def _row(candidate: Candidate, taken: bool) -> list[str]:
    what = _WHAT.get(candidate.name)
    note = f" <small>{what}</small>" if what else ""
    return [
        f"{esc(candidate.name)}{note}",
        esc(candidate.rounding),
        data(candidate.nbytes, count(candidate.nbytes)),
        data(candidate.predicted),
        data_se(candidate.kl),
        "taken" if taken else "",
    ]
