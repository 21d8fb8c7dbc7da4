"""Writes what `pytest -m families` found into docs/families.md, also with several processes.

Rows of families that were not run stay.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.families.table import FAMILIES, UNTRIED

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("converts", "bfloat16", "--refine", "kv", "eval")
HEADER = """# Families

Every model file of mlx-lm {version}, as a tiny model with random weights. "yes" says:

- **converts**: converted with the usual settings, loaded by stock mlx-lm and by `optiq.load`, and
  both give the same on the same tokens with caches. {converts} of {all} do.
- **bfloat16**: the same from weights in bfloat16.
- **--refine**: the same with scales and biases trained; a line says why where nothing is trained.
- **kv**: `optiq kv` chooses formats for its caches, and the model decodes with them.
- **eval**: questions with four answers are asked after a beginning they share, in batches where
  mlx-lm has batches of its caches, else one by one.

For each of the others, the table says why not: a refusal before anything is measured.
`make families` runs them and writes this page.

"""
_found: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    noted = {key: str(value) for key, value in report.user_properties}
    if report.when == "call" and "family" in noted:
        _found[noted["family"]] = [noted.get(column, "fails") for column in COLUMNS]


def pytest_sessionfinish() -> None:
    if not _found:
        return
    text = PAGE.read_text() if PAGE.exists() else ""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    kept = {name: cells for name, *cells in lines if name in FAMILIES and len(cells) == 5}
    rows = sorted({**kept, **_found}.items(), key=lambda row: row[0].lower())
    rows += [(name, [f"not tried: {reason}", *[""] * 4]) for name, reason in UNTRIED.items()]
    converts = sum(cells[0] == "yes" for _, cells in rows)
    table = [["architecture", *(f"`{c}`" for c in COLUMNS)], ["---"] * 6]
    table += [[name, *(cell.replace("|", "\\|") for cell in cells)] for name, cells in rows]
    header = HEADER.format(version=version("mlx-lm"), converts=converts, all=len(rows))
    PAGE.write_text(header + "".join(f"| {' | '.join(row)} |\n" for row in table))
