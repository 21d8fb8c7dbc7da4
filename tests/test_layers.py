"""Imports point one way: each room uses only rooms on lower floors, and no files form a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "optiq"

Floors = Sequence[Sequence[str]]  # bottom up, each with its rooms
Imports = Mapping[str, set[str]]  # by module: the modules of optiq that it imports

# A room may import from rooms on lower floors only, function-level imports included. "optiq" is
# what lies at the root: errors, formats, blas, version.
FLOORS: Floors = (
    ("optiq",),
    ("base",),
    ("chat", "distributed", "sandbox", "ops", "sources"),
    ("models",),
    ("calibration", "nn"),
    ("quality",),
    ("planning", "kv"),
    ("lora",),
    ("runtime", "report"),
    ("quantize", "evals", "serve"),
    ("cards", "doctor"),
    ("cli",),
)
# The rooms of the main job, in the same way, between its options and the jobs themselves.
QUANTIZE: Floors = (
    ("options", "describe"),
    ("replay",),
    ("rounding",),
    ("footprint",),
    ("sensitivity",),
    ("kv",),
    ("optiq.quantize",),
)


@cache
def modules(package: Path) -> dict[str, Path]:
    """The files of the package by their dotted names."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = ["optiq", *file.relative_to(package).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


@cache
def imports(package: Path) -> Imports:
    files = modules(package)
    return {name: set(imported(name, file, files)) for name, file in files.items()}


def imported(name: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
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


def upward(found: Imports, below: str, floors: Floors) -> list[str]:
    """Every import among the rooms of `below` that does not point to a lower floor."""
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}

    def room(module: str) -> str | None:
        if module != below and not module.startswith(f"{below}."):
            return None
        name = module.removeprefix(f"{below}.").split(".")[0]
        if name not in floor and below in floor:
            name = below  # a file at the root
        return name

    wrong = []
    for module, targets in found.items():
        if module == below:  # an __init__.py: what it exports, for type checkers
            continue
        for target in sorted(targets - {below}):
            ours, theirs = room(module), room(target)
            if ours and theirs and ours != theirs and floor[theirs] >= floor[ours]:
                wrong.append(f"{module} imports {target}")
    return wrong


def circle(found: Imports) -> Sequence[str]:
    """Modules that import each other, directly or by way of others; empty if there are none."""
    graph = {
        module: {t for t in targets if t not in ("optiq", module)}
        for module, targets in found.items()
        if module != "optiq"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: Sequence[str] = error.args[1]
        return cycle
    return ()


def test_every_import_points_down() -> None:
    found = imports(PACKAGE)
    assert upward(found, "optiq", FLOORS) == []
    assert upward(found, "optiq.quantize", QUANTIZE) == []


def test_no_files_form_a_circle() -> None:
    assert circle(imports(PACKAGE)) == ()


def test_the_house_is_small_at_its_root() -> None:
    """Every folder has its floor, and no room stands in the list that is not there."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {room for floor in FLOORS for room in floor} - {"optiq"}
    assert len(FLOORS) <= 12
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/matmul.py", "from ..nn import layers"),
        ("ops/matmul.py", "from optiq.nn.layers import Linear"),
        ("planning/plan.py", "import optiq.quantize.export"),
        ("kv/records.py", "from .. import quantize"),
        ("evals/runner.py", "from ..quantize.options import Options"),
        ("quantize/rounding/descent.py", "from ..sensitivity.job import Job"),
        ("quantize/replay/taps.py", "from .. import convert"),
    ],
)
@pytest.mark.parametrize("where", ["{}", "def late() -> None:\n    {}", "if True:\n    {}"])
def test_an_upward_import_is_found_wherever_it_stands(
    tmp_path: Path, file: str, line: str, where: str
) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(where.format(line))
    found = dict(imports(PACKAGE))
    name = "optiq." + file.removesuffix(".py").replace("/", ".")
    found[name] = found[name] | set(imported(name, planted, modules(PACKAGE)))
    wrong = upward(found, "optiq", FLOORS) + upward(found, "optiq.quantize", QUANTIZE)
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{name} imports optiq.")


def test_a_circle_is_found() -> None:
    found = {"optiq.a": {"optiq.b"}, "optiq.b": {"optiq.c"}, "optiq.c": {"optiq.a"}}
    assert set(circle(found)) == set(found)
    assert circle({**found, "optiq.c": {"optiq"}}) == ()
