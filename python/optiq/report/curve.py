"""What a chart of size against KL shows: marks for models, and lines."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..formats import Format
from ..planning.plan import Plan
from ..planning.prediction import frontier, uniform
from ..planning.scores import Scores

WIDTHS = (3, 4, 5, 6, 8)

Line = list[tuple[int, float]]  # bytes of all tensors, KL in nats per token; by rising bytes


@dataclass(frozen=True)
class Mark:
    """One marked model. `nbytes` of all tensors, `kl` and `se` in nats per token."""

    label: str
    kind: str  # "plan", "uniform" or "recipe"
    nbytes: int
    kl: float
    se: float | None = None  # of a measured value; None for a predicted one without error bar
    measured: bool = False


@dataclass(frozen=True)
class Curve:
    """The least KL at each size and, where it is drawn, the KL of uniform widths; and models.

    `across` names the axis of sizes.
    """

    frontier: Line
    marks: list[Mark]
    unpredicted: list[int] = field(default_factory=list)  # uniform widths that have no prediction
    uniform: Line = field(default_factory=list)
    across: str = "size of all tensors"


def trace(plan: Plan, scores: Scores) -> Curve:
    """The plan, the uniform widths, and the frontier from the smallest model to the largest mark.

    A uniform width is left out where a module has no score for it.
    """
    predicted = {bits: uniform(scores, Format("affine", bits, 64)) for bits in WIDTHS}
    marks = [
        Mark(f"{bits}-bit everywhere", "uniform", found.nbytes, found.kl)
        for bits, found in predicted.items()
        if found
    ]
    if plan.predicted_kl is not None:
        marks.append(Mark("plan", "plan", plan.nbytes, plan.predicted_kl))
    for label, kind, model in (
        ("plan", "plan", plan),
        ("stock uniform 4-bit", "uniform", plan.uniform4),
    ):
        if model and model.measured:
            kl = model.measured.kl
            marks.append(Mark(label, kind, model.nbytes, kl.mean, kl.se, True))
    largest = max((mark.nbytes for mark in marks), default=plan.nbytes)
    line = [(point.nbytes, point.kl) for point in frontier(scores, largest)]
    return Curve(line, marks, [bits for bits, found in predicted.items() if not found])
