"""plan.json and sensitivity.json laid out as a grid: one row per block, one column per module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log10
from typing import Any

from ..errors import SensitivityError
from ..formats import DENSE, Format
from .colors import LEVELS
from .text import finite

_BITS_LEVEL = {2: 0.04, 3: 0.20, 4: 0.36, 5: 0.52, 6: 0.68, 8: 0.84, 16: 1.0}
_GROUP_SHIFT = {16: 0.08, 32: 0.05, 64: 0.0, 128: -0.05, 0: 0.0}


@dataclass(frozen=True)
class Cell:
    """One quantizable module: what was measured and what was chosen."""

    path: str
    role: str
    block: int | None
    shape: list[int]
    format: Format
    nbytes: int
    scores: dict[Format, tuple[float | None, float | None]]  # format -> (KL, its standard error)
    errors: dict[Format, float] = field(default_factory=dict)  # relative, of the weight itself

    def loss(self, fmt: Format) -> float | None:
        """KL in nats per token; zero for dense unless it was measured, None when unknown."""
        return self.scores.get(fmt, (0.0 if fmt == DENSE else None, None))[0]

    def near4(self) -> Format | None:
        """The measured format nearest to 4 bits (ties: affine, fewer bits, then nearest g64)."""
        measured = [f for f, (kl, _) in self.scores.items() if f != DENSE and kl is not None]
        return min(
            measured,
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


def _cells(plan: dict[str, Any], scores: dict[str, Any]) -> list[Cell]:
    measured = {module["path"]: module["scores"] for module in scores["modules"]}
    return [
        Cell(
            path=m["path"],
            role=m["role"],
            block=m["block"],
            shape=m["shape"],
            format=Format.parse(m["format"]),
            nbytes=m["nbytes"],
            scores={
                Format.parse(name): (finite(score.get("kl")), finite(score.get("se")))
                for name, score in measured.get(m["path"], {}).items()
            },
            errors={
                Format.parse(name): error
                for name, score in measured.get(m["path"], {}).items()
                if (error := finite(score.get("mse"))) is not None
            },
        )
        for m in plan["modules"]
    ]


def _split(cell: Cell) -> tuple[str, str, str]:
    """(column key, parent, leaf): "model.layers.3.mlp.up_proj" -> ("model.layers.*.mlp.up_proj",
    "mlp", "up"). The key keeps the whole path, so no two modules of a block share a cell."""
    parts = cell.path.split(".")
    at = parts.index(str(cell.block)) if str(cell.block) in parts else -1
    key = ".".join([*parts[:at], "*", *parts[at + 1 :]]) if at >= 0 else cell.path
    *parents, leaf = parts[at + 1 :] or parts[-1:]
    return key, ".".join(parents), leaf.removesuffix("_proj")


def lay_out(plan: dict[str, Any], scores: dict[str, Any]) -> Grid:
    """The grid of both maps. Columns keep flow order, gathered by parent module.

    Raises SensitivityError when the scores were measured on another model.
    """
    ours, theirs = plan["model"]["fingerprint"], scores["model"]["fingerprint"]
    if ours != theirs:
        raise SensitivityError(
            f"the scores belong to model {str(theirs)[:12]}, the plan to {str(ours)[:12]}; "
            "measure the planned model with `optiq sensitivity`"
        )
    cells = _cells(plan, scores)
    groups: dict[str, dict[str, str]] = {}
    rows: dict[tuple[str, object], Row] = {}
    for cell in cells:
        if cell.block is None:
            rows[("single", cell.path)] = Row(cell.role, {}, cell)
            continue
        key, parent, leaf = _split(cell)
        groups.setdefault(parent, {})[key] = leaf
        row = rows.setdefault(("block", cell.block), Row(str(cell.block), {}))
        row.cells[key] = cell
    return Grid([(p, list(c.items())) for p, c in groups.items()], list(rows.values()), cells)


@dataclass(frozen=True)
class LogScale:
    """Maps a positive KL to one of the colour levels, evenly in its logarithm."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> LogScale:
        """From the smallest to the largest positive value; one decade when all are equal."""
        positive = [v for v in values if v is not None and v > 0]
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


def uniform(grid: Grid, bits: int, itemsize: int) -> tuple[int, float] | None:
    """(module bytes, predicted KL in nats per token) of one width everywhere at group 64.

    Weights that 64 does not divide stay dense, as in `mlx_lm.convert`. None when a format it
    needs was not measured.
    """
    nbytes, total = 0, 0.0
    for cell in grid.cells:
        fmt = Format("affine", bits, 64)
        fmt = fmt if fmt.fits(cell.shape) else DENSE
        kl = cell.loss(fmt)
        if kl is None:
            return None
        nbytes += fmt.nbytes(cell.shape, itemsize)
        total += kl
    return nbytes, total
