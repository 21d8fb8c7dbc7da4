"""Which estimated scores decide the plan at a size. Tables in, tables out.

At the price of a byte in the best plan, a module takes the format of least score + price * bytes.
A module is contested where another format would be that, were its estimated scores wrong by their
error. Only these formats are worth an exact measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erfc, exp, hypot, pi, sqrt

from ..formats import Format
from .allocation import allocate
from .plan import problem
from .scores import Score, Scores
from .size import Size

# Standard deviation of log(fisher score / exact KL), measured on searched weights (fisher.py has
# that of min/max, 0.14). About half of the variance is common to all formats of a module.
SPREAD = 0.20


@dataclass(frozen=True)
class Contest:
    """A module, its competing formats that are not exact, and what to gain, in nats per token.

    The gain is how much lower the plan's KL is expected to be if the better format is known.
    """

    path: str
    formats: tuple[Format, ...]
    gain: float


def contests(scores: Scores, size: Size) -> list[Contest]:
    """The contested modules at `size`, in the order of `scores`.

    Raises BudgetError when no plan is small enough.
    """
    items, budget = problem(scores, size)
    found = allocate(items, budget)
    known = {scored.module.path: scored.scores for scored in scores.modules}
    contested = []
    for item in items[1:]:
        chosen = found.formats[item.name]
        errors = {c.format: _error(known[item.name].get(c.format)) for c in item.choices}
        cost = {c.format: c.loss + found.price * c.nbytes for c in item.choices}
        rivals, gain = {chosen}, 0.0
        for fmt, error in errors.items():
            unsure = error.of_difference(errors[chosen])
            lead = cost[fmt] - cost[chosen]
            if fmt != chosen and unsure > 0 and lead < unsure:
                rivals.add(fmt)
                gain = max(gain, _expected_gain(lead, unsure))
        if gain > 0:
            contested.append(
                Contest(item.name, tuple(sorted(f for f in rivals if errors[f].own > 0)), gain)
            )
    return contested


@dataclass(frozen=True)
class _Error:
    """Standard errors of a score, in nats per token; 0 where it is exact.

    What the sample of text adds, `se` in the file, moves all formats of a module alike.
    """

    shared: float
    own: float

    def of_difference(self, other: _Error) -> float:
        return hypot(self.shared - other.shared, self.own, other.own)


def _error(score: Score | None) -> _Error:
    if score is None or score.method != "fisher":
        return _Error(0.0, 0.0)
    part = SPREAD / sqrt(2) * abs(score.kl)
    return _Error(hypot(part, score.se or 0.0), part)


def _expected_gain(lead: float, error: float) -> float:
    """Mean of max(0, -x), x being normal around `lead` with this standard deviation."""
    z = lead / error
    return error * exp(-z * z / 2) / sqrt(2 * pi) - lead * erfc(z / sqrt(2)) / 2
