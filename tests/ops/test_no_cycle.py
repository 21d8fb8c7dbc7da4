"""No module of optiq.ops imports itself by way of others, not even inside a function."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import optiq

OPS = Path(optiq.__file__).parent / "ops"
MODULES = {file.stem for file in OPS.glob("*.py")} - {"__init__"}


def imported(module: str) -> set[str]:
    """The modules of optiq.ops that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse((OPS / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            base = {0: "", 1: "optiq.ops.", 2: "optiq."}[node.level] + (node.module or "")
            found |= {base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in MODULES if f"optiq.ops.{name}" in found}


def test_imports_have_an_order() -> None:
    graph = {module: imported(module) for module in MODULES}
    assert {"native", "affine"} <= graph["matmul"]  # imports of both kinds are seen
    TopologicalSorter(graph).prepare()  # raises CycleError
