"""Predicted KL against size: the Pareto frontier of the scores and the points to set against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .layout import Grid, uniform
from .text import finite

BUDGETS = 25
WIDTHS = (3, 4, 5, 6, 8)
# A curve a few pixels wide needs no proof of optimality: the relaxation is already within one
# choice of it, so the search behind each point is kept short.
MAX_STATES = 50_000


@dataclass(frozen=True)
class Point:
    """One marked model. `nbytes` of all tensors, `kl` and `se` in nats per token."""

    label: str
    kind: str  # "plan", "uniform" or "recipe"
    nbytes: int
    kl: float
    se: float | None = None  # of a measured value; None for a predicted one without error bar
    measured: bool = False


@dataclass(frozen=True)
class Curve:
    """Lines are (bytes of all tensors, KL in nats per token) by rising bytes."""

    frontier: list[tuple[int, float]]
    points: list[Point]
    unpredicted: list[int]  # uniform widths that some module has no score for
    uniform: list[tuple[int, float]] = field(default_factory=list)


def trace(plan: dict[str, Any], scores: dict[str, Any], grid: Grid) -> Curve:
    """The frontier from the smallest possible model to 8 bits, the plan and the uniform widths.

    The frontier is empty when a module has no score at all: nothing can be predicted then.
    """
    fixed, itemsize = scores["model"]["fixed_bytes"], scores["model"]["itemsize"]
    points: list[Point] = []
    unpredicted: list[int] = []
    for bits in WIDTHS:
        predicted = uniform(grid, bits, itemsize)
        if predicted is None:
            unpredicted.append(bits)
            continue
        nbytes, kl = predicted
        points.append(Point(f"{bits}-bit everywhere", "uniform", nbytes + fixed, kl))
    predicted_kl = finite(plan["objective"]["predicted_kl"])
    if predicted_kl is not None:
        points.append(Point("plan", "plan", plan["nbytes"], predicted_kl))
    stock = plan.get("uniform4") or {}
    for label, kind, owner in (("plan", "plan", plan), ("stock uniform 4-bit", "uniform", stock)):
        stat = (owner.get("measured") or {}).get("kl") or {}
        mean = finite(stat.get("mean"))
        if mean is not None:
            se = finite(stat.get("se"))
            points.append(Point(label, kind, owner["nbytes"], mean, se, True))
    return Curve(_frontier(grid, fixed, itemsize, points), points, unpredicted)


def _frontier(
    grid: Grid, fixed: int, itemsize: int, points: list[Point]
) -> list[tuple[int, float]]:
    from ..models.roles import Module, Role, allowed
    from ..planning.allocation import Choice, Item, allocate

    menu = sorted({fmt for cell in grid.cells for fmt in cell.scores})
    items = []
    for cell in grid.cells:
        module = Module(cell.path, Role(cell.role), "", tuple(cell.shape), cell.block)
        choices = tuple(
            Choice(fmt, fmt.nbytes(cell.shape, itemsize), kl)
            for fmt in allowed(module, menu)
            if (kl := cell.loss(fmt)) is not None
        )
        if not cell.scores or not choices:
            return []
        items.append(Item(cell.path, choices))
    smallest = sum(min(c.nbytes for c in item.choices) for item in items)
    largest = sum(max(c.nbytes for c in item.choices) for item in items)
    largest = min(largest, max([p.nbytes - fixed for p in points], default=largest))
    frontier = {}
    for i in range(BUDGETS):
        budget = round(smallest * (max(largest, smallest) / smallest) ** (i / (BUDGETS - 1)))
        best = allocate(items, budget, max_states=MAX_STATES)
        frontier[best.nbytes + fixed] = best.loss
    return sorted(frontier.items())
