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

Which of mlx-lm {version}'s model files work with optiq, tried on a tiny model of each with random
weights. "yes" means:

- **converts**: the model was converted with the default settings. Stock mlx-lm and `optiq.load`
  both load the result and give the same output on the same tokens with caches. {converts} of
  {all} do.
- **bfloat16**: the same with weights in bfloat16.
- **--refine**: the same with trained gains. If nothing was trained, the table says why.
- **kv**: `optiq kv` chose formats for its caches, and the model decodes with them.
- **eval**: questions with four answers were asked after a shared beginning. They ran in batches
  if mlx-lm can batch the model's caches, otherwise one by one.

If a cell is not "yes", it gives the reason. optiq refuses such a model before it measures anything.
`make families` runs all of them and writes this page.

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
