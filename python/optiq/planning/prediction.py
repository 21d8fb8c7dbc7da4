"""KL that scores predict at other sizes: of uniform widths, and the least at each size."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from ..formats import DENSE, Format
from .allocation import allocate
from .plan import problem, uniform_plan
from .scores import Scores
from .size import Size

BUDGETS = 25
# A curve a few pixels wide needs no proof of optimality: the relaxation is already within one
# choice of it, so the search behind each point is kept short.
MAX_STATES = 50_000


@dataclass(frozen=True)
class Predicted:
    """Bytes of all tensors, and the sum of scores in nats per token."""

    nbytes: int
    kl: float


def uniform(scores: Scores, fmt: Format) -> Predicted | None:
    """What stock `mlx_lm.convert` with one format would give; None where a score is missing."""
    modules = {scored.module.path: scored for scored in scores.modules}
    plan = uniform_plan(scores.model, [scored.module for scored in scores.modules], fmt)
    chosen = [(modules[planned.module.path], planned.format) for planned in plan.modules]
    if any(f not in scored.scores and f != DENSE for scored, f in chosen):
        return None
    return Predicted(plan.nbytes, fsum(scored.loss(f) for scored, f in chosen))


def frontier(scores: Scores, most: int) -> list[Predicted]:
    """The least KL at each size, from the smallest possible model to one of `most` bytes."""
    (rest, *items), _ = problem(scores, Size("uniform4"))
    fixed = rest.choices[0].nbytes
    smallest = sum(min(c.nbytes for c in item.choices) for item in items)
    largest = sum(max(c.nbytes for c in item.choices) for item in items)
    largest = max(smallest, min(largest, most - fixed))
    found: dict[int, float] = {}
    for i in range(BUDGETS):
        budget = round(smallest * (largest / smallest) ** (i / (BUDGETS - 1)))
        best = allocate(items, budget, max_states=MAX_STATES)
        found[best.nbytes + fixed] = best.loss
    return [Predicted(nbytes, kl) for nbytes, kl in sorted(found.items())]
