"""The plans that were proposed, what each was measured to lose, and the one that was taken."""

from __future__ import annotations

from typing import Any

from .text import MISSING, UNKNOWN, count, data, data_se, esc, finite, number

_WHAT = {
    "scores": "least predicted KL",
    "coupled": "one format for modules that share an input",
    "cautious": "scores with two standard errors on top",
    "smooth": "scores with their noise averaged away",
    "wide": "no format below 4 bits",
    "uniform": "the widest format that fits for all modules",
}


def section(plan: dict[str, Any]) -> str:
    """The section about the plan's `selection`; empty where it has none, as `optiq plan` writes."""
    selection = plan.get("selection")
    if not selection:
        return ""
    body = _table(selection) if selection.get("candidates") else _untested(selection)
    return f"<section>\n<h2>Plans compared</h2>\n{body}\n</section>"


def _untested(selection: dict[str, Any]) -> str:
    return (
        f"<p>The plan <em>{esc(selection.get('chosen'))}</em> was taken, {MISSING} against others: "
        "there was no text to choose by, or no memory for the model beside its source.</p>"
    )


def _table(selection: dict[str, Any]) -> str:
    head = "<th>plan</th><th>rounding</th><th>bytes</th><th>predicted KL</th>"
    head += "<th>measured KL ± se</th><th></th>"
    chosen = selection.get("chosen"), selection.get("rounding")
    rows = "".join(_row(c, chosen) for c in selection["candidates"])
    text = selection.get("text_sha256")
    where = f"text <code>{esc(str(text)[:12])}</code>" if text else UNKNOWN
    return (
        "<p>A sum of scores ranks plans well but not perfectly, so several plans of the size were "
        "rounded and run, and the one of least measured KL was taken: the mean over "
        f"{esc(selection.get('tokens'))} tokens in {esc(selection.get('sequences'))} sequences "
        f"({where}) that no score and no rounding was made from, in nats per token.</p>"
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_trust(selection)}"
    )


def _trust(selection: dict[str, Any]) -> str:
    """How well the scores foretold what was measured, as far as it is known."""
    ratio, rank = finite(selection.get("ratio")), finite(selection.get("rank_correlation"))
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


def _row(candidate: dict[str, Any], chosen: tuple[Any, Any]) -> str:
    name, rounding = candidate.get("name"), candidate.get("rounding")
    what = _WHAT.get(str(name))
    note = f" <small>{what}</small>" if what else ""
    nbytes = candidate.get("nbytes")
    mark = "taken" if (name, rounding) == chosen else ""
    return (
        f'<tr><th scope="row">{esc(name)}{note}</th><td>{esc(rounding)}</td>'
        f"<td>{data(nbytes, count(nbytes) if isinstance(nbytes, int) else None)}</td>"
        f"<td>{data(candidate.get('predicted'))}</td><td>{data_se(candidate.get('kl'))}</td>"
        f"<td>{mark}</td></tr>"
    )
