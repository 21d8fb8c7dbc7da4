"""The picture of the README: size against KL of SmolLM2-135M-Instruct, from docs/quality.md.

python -m bench.picture        # writes docs/size-kl.svg
"""

from __future__ import annotations

import re
from pathlib import Path

from optiq.report.curve import Curve, Mark
from optiq.report.svg import chart

DOCS = Path(__file__).parent.parent / "docs"
PARAMETERS = 134_515_008

STYLE = """<style>
text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1d1f21; }
.tick { fill: #5d6166; font-size: 12px; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.rule { stroke: #dcdcd6; } .axis { stroke: #5d6166; }
.frontier { fill: none; stroke: #a63a1e; stroke-width: 1.75; } .frontier.plain { stroke: #6a6f75; }
.mark.plan { fill: #a63a1e; } .mark.uniform { fill: #6a6f75; } .mark.recipe { fill: #296c97; }
.label.plan { fill: #a63a1e; font-weight: 600; } .label.recipe { fill: #296c97; }
.error { stroke: currentColor; fill: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e5e1; } .tick { fill: #a2a6aa; } .rule { stroke: #36393d; }
  .axis { stroke: #a2a6aa; }
  .frontier { stroke: #f0956f; } .frontier.plain { stroke: #9aa0a6; }
  .mark.plan { fill: #f0956f; } .mark.uniform { fill: #9aa0a6; } .mark.recipe { fill: #81bec3; }
  .label.plan { fill: #f0956f; } .label.recipe { fill: #81bec3; }
}
</style>"""


def rows() -> list[tuple[str, float, float, float]]:
    """Name, bits per weight, KL and its error: the first table of docs/quality.md."""
    text = (DOCS / "quality.md").read_text(encoding="utf-8")
    table = text.partition("## Sizes and KL")[2].partition("Ratios")[0].partition("Three seeds")[0]
    found = re.findall(r"\| ([^|]+) \| ([\d.]+) \| \**([\d.]+) ± ([\d.]+)\** \|", table)
    return [(name.replace("*", ""), float(b), float(kl), float(se)) for name, b, kl, se in found]


def kind_of(name: str) -> str | None:
    if name.startswith("optiq"):
        return "plan"
    if name.startswith("stock uniform") and name.endswith("g64"):
        return "uniform"
    return "recipe" if name.startswith("mlx-lm") else None


def label(name: str) -> str:
    return name.removeprefix("stock ").removesuffix(" g64").replace("`", "")


def main() -> None:
    marks = [
        Mark(label(name), kind, round(bpw * PARAMETERS / 8), kl, se, True)
        for name, bpw, kl, se in rows()
        if (kind := kind_of(name))
    ]
    lines = {
        kind: [(m.nbytes, m.kl) for m in marks if m.kind == kind] for kind in ("plan", "uniform")
    }
    drawn = chart(Curve(lines["plan"], marks, uniform=lines["uniform"]), 760, 400)
    alone = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = alone.index(">") + 1
    (DOCS / "size-kl.svg").write_text(
        f"{alone[:start]}\n{STYLE}{alone[start:]}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
