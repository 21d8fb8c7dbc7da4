"""A plan and its scores laid out as a grid: one row per block, one column per module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log10

from ..errors import SensitivityError
from ..formats import DENSE, Format
from ..models.roles import Module
from ..planning.plan import Plan, Planned
from ..planning.scores import Score, Scores
from .colors import LEVELS

_BITS_LEVEL = {2: 0.04, 3: 0.20, 4: 0.36, 5: 0.52, 6: 0.68, 8: 0.84, 16: 1.0}
_GROUP_SHIFT = {16: 0.08, 32: 0.05, 64: 0.0, 128: -0.05, 0: 0.0}


@dataclass(frozen=True)
class Cell:
    """One quantizable module: what was chosen, and what was measured."""

    planned: Planned
    scores: Mapping[Format, Score]

    @property
    def module(self) -> Module:
        return self.planned.module

    @property
    def format(self) -> Format:
        return self.planned.format

    @property
    def nbytes(self) -> int:
        return self.planned.nbytes

    def near4(self) -> Format | None:
        """The measured format nearest to 4 bits (ties: affine, fewer bits, then nearest g64)."""
        return min(
            (fmt for fmt in self.scores if fmt != DENSE),
            key=lambda f: (abs(f.bits - 4), f.mode, f.bits, abs(f.group_size - 64)),
            default=None,
        )


@dataclass(frozen=True)
class Row:
    """A block (`cells` keyed by column) or one module outside the blocks (`single`)."""

    label: str
    cells: dict[str, Cell]
    single: Cell | None = None


@dataclass(frozen=True)
class Grid:
    """`groups`: (parent module, its columns as (key, leaf name)); `rows` in flow order."""

    groups: list[tuple[str, list[tuple[str, str]]]]
    rows: list[Row]
    cells: list[Cell]

    @property
    def columns(self) -> list[str]:
        return [key for _, leaves in self.groups for key, _ in leaves]


def _split(module: Module) -> tuple[str, str, str]:
    """(column key, parent, leaf): "model.layers.3.mlp.up_proj" -> ("model.layers.*.mlp.up_proj",
    "mlp", "up"). The key keeps the whole path, so no two modules of a block share a cell."""
    parts, block = module.path.split("."), str(module.block)
    at = parts.index(block) if block in parts else -1
    key = ".".join([*parts[:at], "*", *parts[at + 1 :]]) if at >= 0 else module.path
    *parents, leaf = parts[at + 1 :] or parts[-1:]
    return key, ".".join(parents), leaf.removesuffix("_proj")


def lay_out(plan: Plan, scores: Scores) -> Grid:
    """The grid of both maps. Columns keep flow order, gathered by parent module.

    Raises SensitivityError when the scores were measured on another model.
    """
    cells = _cells(plan, scores)
    groups: dict[str, dict[str, str]] = {}
    rows: dict[tuple[str, object], Row] = {}
    for cell in cells:
        module = cell.module
        if module.block is None:
            rows[("single", module.path)] = Row(module.role.value, {}, cell)
            continue
        key, parent, leaf = _split(module)
        groups.setdefault(parent, {})[key] = leaf
        row = rows.setdefault(("block", module.block), Row(str(module.block), {}))
        row.cells[key] = cell
    return Grid([(p, list(c.items())) for p, c in groups.items()], list(rows.values()), cells)


def _cells(plan: Plan, scores: Scores) -> list[Cell]:
    ours, theirs = plan.model.fingerprint, scores.model.fingerprint
    known = {scored.module.path: scored.scores for scored in scores.modules}
    if ours != theirs or not all(m.module.path in known for m in plan.modules):
        raise SensitivityError(
            f"the scores belong to model {str(theirs)[:12]}, the plan to {str(ours)[:12]}; "
            "measure the planned model with `optiq sensitivity`"
        )
    return [Cell(m, known[m.module.path]) for m in plan.modules]


@dataclass(frozen=True)
class LogScale:
    """Maps a positive KL to one of the colour levels, evenly in its logarithm."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float]) -> LogScale:
        """From the smallest to the largest positive value; one decade when all are equal."""
        positive = [v for v in values if v > 0]
        if not positive:
            return cls(1e-3, 1e-2)
        low, high = min(positive), max(positive)
        return cls(low, high) if high > low * 1.001 else cls(low / 10**0.5, low * 10**0.5)

    def level(self, value: float) -> int:
        """0 for everything at or below the low end: a KL of zero has no logarithm."""
        if value <= self.low:
            return 0
        t = log10(value / self.low) / log10(self.high / self.low)
        return min(LEVELS - 1, round(t * (LEVELS - 1)))


def format_level(fmt: Format) -> int:
    """Colour level of a format: by bits, a shade up for small groups and down for large ones."""
    t = _BITS_LEVEL[fmt.bits] + _GROUP_SHIFT[fmt.group_size]
    return round(min(1.0, max(0.0, t)) * (LEVELS - 1))
