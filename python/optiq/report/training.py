"""The page of a run of `optiq lora train`: its losses as a chart, its ranks, how it was made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..lora.adapter import Adapter
from .document import code, document, facts, known, pairs
from .text import count, data, esc, number

KICKER = "optiq lora train"
TOP, RIGHT, BOTTOM, LEFT = 30, 18, 46, 58  # px around the plot

Line = Sequence[tuple[int, float]]  # updates done, loss


def training_page(adapter: Adapter) -> str:
    """The page for an adapter that `optiq lora train` wrote."""
    made = adapter.made
    trained = [(u["step"], u["loss"]) for u in made["updates"]]
    judged = [(j["step"], j["loss"]) for j in made["judged"]]
    drawings = "".join(
        f'<div class="{css}">{_chart(trained, judged, width, height)}</div>'
        for css, width, height in (("wide", 810, 440), ("narrow", 360, 340))
    )
    return document(
        adapter.base.name if adapter.base else "an adapter",
        KICKER,
        f"""<p>{_verdict(trained, judged)}</p>
</header>
<section>
<h2>Loss</h2>
<p>In nats per token to learn. The grey line is the loss of each batch, before its update; the line
with circles is that of rows which were held out.</p>
<figure>{drawings}</figure>
</section>
<section>
<h2>Ranks</h2>
{_ranks(adapter)}
</section>
{_provenance(adapter)}""",
    )


def _verdict(trained: Line, judged: Line) -> str:
    if not judged:
        return (
            f"Loss {data(trained[0][1])} in the first update and {data(trained[-1][1])} in the "
            "last. No rows were held out, so it is not known what was learned and what was "
            "remembered."
        )
    best = min(judged, key=lambda at: at[1])
    before = f"Held-out loss was {data(judged[0][1])} before training"
    if best[0] == 0:
        return f"{before}, and never lower after it: the adapter changes nothing."
    return f"{before} and {data(best[1])} after {best[0]} updates, which is what was written."


def _chart(trained: Line, judged: Line, width: int, height: int) -> str:
    losses = [loss for _, loss in (*trained, *judged)]
    last = max(step for step, _ in (*trained, *judged))
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def at(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + step / max(last, 1) * (width - LEFT - RIGHT)
        return x, height - BOTTOM - (loss - low) / span * (height - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="loss by update">',
        f'<text class="tick" x="4" y="{TOP - 14}">loss</text>',
    ]
    for i in range(5):
        loss = low + span * i / 4
        y = at(0, loss)[1]
        line = f'x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="rule" {line}/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{number(loss)}</text>')
    for css, points in (("frontier plain", trained), ("frontier", judged)):
        drawn = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
        parts.append(f'<polyline class="{css}" points="{drawn}"/>')
    for step, loss in judged:
        x, y = at(step, loss)
        parts.append(
            f'<g class="mark plan measured"><title>update {step}: held-out loss {number(loss, 4)}'
            f'</title><circle cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    end = f'x="{width - RIGHT}" y="{height - BOTTOM + 19}"'
    parts.append(f'<text class="tick end" {end}>{last} updates</text>')
    return "\n".join([*parts, "</svg>"])


def _ranks(adapter: Adapter) -> str:
    """A row for each rank: how many layers have it, and which."""
    layers: dict[int, list[str]] = defaultdict(list)
    for path, rank in adapter.ranks.items():
        layers[rank].append(path)
    rows = "".join(
        f'<tr title="{esc(", ".join(of))}"><th scope="row">{rank}</th>'
        f"<td>{data(len(of), count(len(of)))}</td></tr>"
        for rank, of in sorted(layers.items())
    )
    return (
        '<div class="scroll"><table class="figures"><thead><tr><th>rank</th><th>layers</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        f"<p>{count(adapter.parameters)} parameters in all.</p>"
    )


def _provenance(adapter: Adapter) -> str:
    made, base = adapter.made, adapter.base
    rows = [
        ("Base", known(base.name if base else None)),
        ("Fingerprint of the base", code(base.fingerprint if base else None)),
        ("sha256 of the adapter", code(adapter.digest)),
        ("Rows", pairs(made["data"])),
        ("Ranks from", known(", ".join(made["ranks_from"]) or made["options"]["ranks"])),
        ("Options", pairs(made["options"])),
        ("Memory, stated before", known(made["stated_bytes"])),
        ("Peak memory", known(made["peak_bytes"])),
        ("Command", code(made["command"] or None)),
        ("Versions", pairs(made["versions"])),
        ("Machine", pairs(made["machine"])),
    ]
    return f"""<section>
<h2>How the numbers were made</h2>
{facts(rows)}
</section>"""
