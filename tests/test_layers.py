"""Imports point one way: each room uses only rooms on lower floors, and no files form a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "optiq"

# Bottom up. A room may import from rooms on lower floors only, function-level imports included.
# "optiq" is what lies at the root: errors, formats, blas, and __init__.py with the version.
FLOORS = (
    ("optiq",),
    ("base",),
    ("chat", "distributed", "sandbox", "ops", "sources"),
    ("models",),
    ("calibration", "nn"),
    ("quality",),
    ("planning", "kv"),
    ("runtime", "report"),
    ("quantize", "evals"),
    ("cards", "doctor"),
    ("cli",),
)
# The rooms of the largest room, in the same way.
QUANTIZE = (
    ("replay",),
    ("rounding",),
    ("sensitivity",),
    ("kv",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

Imports = Mapping[str, set[str]]  # by module: the modules of optiq that it imports


def modules(package: Path) -> dict[str, Path]:
    """The files of the package by their dotted names."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = ["optiq", *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(package: Path) -> Imports:
    files = modules(package)
    return {name: set(_imported(name, file, files)) for name, file in files.items()}


def _imported(name: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known or source in known:
                    yield inner if inner in known else source


def room(module: str, below: str = "optiq") -> str:
    """The folder right below the package `below` that a module lies in, else `below` itself."""
    parts = module.removeprefix(f"{below}.").split(".")
    return parts[0] if len(parts) > 1 or (PACKAGE / parts[0]).is_dir() else below


def upward(found: Imports) -> list[str]:
    """Every import that does not point to a lower floor or stay in its room."""
    return [
        f"{module} imports {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if room(module) != room(target) and FLOOR[room(target)] >= FLOOR[room(module)]
        if module != "optiq"  # the names that it exports, for type checkers
    ]


def circles(found: Imports) -> list[list[str]]:
    """The sets of modules that import each other, directly or by way of others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    closed: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in found[module] - {module}:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            closed.append(stack[at:])
            del stack[at:]

    for module in found:
        if module not in index:
            visit(module)
    return [sorted(group) for group in closed if len(group) > 1]
