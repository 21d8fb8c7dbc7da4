"""Writes what `pytest -m families` found into docs/families.md, also with several processes.

Rows of families that were not run stay.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from tests.families.table import FAMILIES, UNTRIED

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEADER = """# Families

Every model file of mlx-lm {version}, as a tiny model with random weights: converted with the usual
settings, loaded by stock mlx-lm and by `optiq.load`, and both run on the same tokens with caches.
{converts} of {all} convert. For each of the others, the table says why not.
`make families` runs them and writes this page.

| architecture | result |
|---|---|
"""
_found: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    noted = dict(report.user_properties)
    if report.when == "call" and "family" in noted:
        _found[str(noted["family"])] = str(noted.get("outcome", "fails"))


def pytest_sessionfinish() -> None:
    if not _found:
        return
    text = PAGE.read_text() if PAGE.exists() else ""
    lines = [line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    kept = {name: outcome for name, outcome in lines if name in FAMILIES}
    rows = sorted({**kept, **_found}.items(), key=lambda row: row[0].lower())
    rows += [(name, f"not tried: {reason}") for name, reason in UNTRIED.items()]
    converts = sum(outcome == "converts" for _, outcome in rows)
    header = HEADER.format(version=version("mlx-lm"), converts=converts, all=len(rows))
    PAGE.write_text(header + "".join(f"| {name} | {outcome} |\n" for name, outcome in rows))
