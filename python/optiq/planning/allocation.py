"""Which format for which module: an exact multiple-choice knapsack.

Pick one choice per item so that the sum of losses is smallest and the sum of bytes stays within
the budget. Three steps, all on plain numbers:

1. Linear relaxation (Dyer 1984, Zemel 1984): start at each item's smallest choice, walk down the
   lower convex hulls in order of loss saved per byte until the budget is full. This gives a
   feasible `base` that is optimal for its Lagrangian, and a lower bound.
2. Reduction: drop every choice that even in the relaxation costs more than the best known
   solution. Few items keep an alternative; they are the core.
3. Dynamic programme over the core (Pisinger 1995, "A minimal algorithm for the multiple-choice
   knapsack problem"): states are Pareto-optimal (bytes, loss) pairs relative to `base`. A state is
   kept only while its bound beats the best solution: every byte still free saves at most the best
   slope left, every byte above the budget costs at least the cheapest slope left.

When the core is exhausted the best solution is proven optimal. `max_states` caps the work of
adversarial inputs; the answer then carries the gap that is still proven.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum, inf, isfinite

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError, SensitivityError
from ..formats import Format

MAX_STATES = 10_000_000
TIE = 1e-14  # relative: sums of the same losses in another order differ by less


@dataclass(frozen=True)
class Choice:
    """One format for an item: its exact bytes and the loss it is expected to cost (any unit)."""

    format: Format
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """A module and the formats it may take."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Allocation:
    """The chosen formats by item name; no assignment within the budget has a loss below `bound`.

    `price` is the loss that one more byte would save, in the linear relaxation.
    """

    formats: dict[str, Format]
    nbytes: int
    loss: float
    bound: float
    gap: float  # (loss - bound) / |bound|, 0 when proven optimal
    price: float


def allocate(items: Sequence[Item], budget: int, *, max_states: int = MAX_STATES) -> Allocation:
    """Minimise the sum of losses over one choice per item, with at most `budget` bytes in all.

    Equal losses prefer fewer bytes. Raises `BudgetError` when even the smallest choices are too
    big, `SensitivityError` when a loss is not finite or an item has no choice.
    """
    menu = [_undominated(item) for item in items]
    smallest = sum(choices[0].nbytes for choices in menu)
    if smallest > budget:
        raise BudgetError(
            f"a budget of {budget:,} bytes is too small: the smallest possible plan takes "
            f"{smallest:,} bytes; raise the size or allow narrower formats within each role's floor"
        )
    base, price, incumbent = _relax(menu, budget)
    start = _Incumbent(menu, base, incumbent, budget)
    bound = _search(menu, base, price, start, max_states)
    chosen = [choices[j] for choices, j in zip(menu, start.levels, strict=True)]
    loss = fsum(choice.loss for choice in chosen)
    bound = loss if bound is None else min(loss, start.base_loss + bound)
    return Allocation(
        formats={item.name: c.format for item, c in zip(items, chosen, strict=True)},
        nbytes=sum(choice.nbytes for choice in chosen),
        loss=loss,
        bound=bound,
        gap=0.0 if loss <= bound else (loss - bound) / max(abs(bound), 1e-300),
        price=price,
    )


def _undominated(item: Item) -> list[Choice]:
    """The item's choices by rising bytes and strictly falling loss; the rest can never be best."""
    if not item.choices:
        raise SensitivityError(f"{item.name} has no allowed format; add one to --formats")
    kept: list[Choice] = []
    for choice in sorted(item.choices, key=lambda c: (c.nbytes, c.loss, c.format)):
        if not isfinite(choice.loss):
            raise SensitivityError(
                f"the score of {item.name} at {choice.format} is {choice.loss}; measure it again"
            )
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _hull(choices: list[Choice]) -> Iterator[tuple[float, int, int]]:
    """Steps (slope < 0, from, to) along the lower convex hull; slopes rise strictly."""
    steps: list[tuple[float, int, int]] = []
    for j in range(1, len(choices)):
        i = j - 1
        while True:
            run = choices[j].nbytes - choices[i].nbytes
            slope = (choices[j].loss - choices[i].loss) / run
            if not steps or steps[-1][0] < slope:
                break
            i = steps.pop()[1]
        steps.append((slope, i, j))
    return iter(steps)


def _relax(menu: list[list[Choice]], budget: int) -> tuple[list[int], float, list[int]]:
    """The relaxation's integer part, the loss a byte is worth there, and a filled-up solution."""
    levels = [0] * len(menu)
    used = sum(choices[0].nbytes for choices in menu)
    steps = sorted((slope, i, a, b) for i, c in enumerate(menu) for slope, a, b in _hull(c))
    base, price = levels, 0.0
    for slope, i, a, b in steps:
        extra = menu[i][b].nbytes - menu[i][a].nbytes
        if levels[i] == a and used + extra <= budget:
            levels[i], used = b, used + extra
        elif base is levels:  # the first step that does not fit sets the price of a byte
            base, price = list(levels), -slope
    return list(base), price, levels


class _Incumbent:
    """The best solution so far, in bytes and loss relative to `base`."""

    def __init__(
        self, menu: list[list[Choice]], base: list[int], levels: list[int], budget: int
    ) -> None:
        at_base = [choices[j] for choices, j in zip(menu, base, strict=True)]
        at_levels = [choices[j] for choices, j in zip(menu, levels, strict=True)]
        self.levels = levels
        self.base_loss = fsum(choice.loss for choice in at_base)
        self.room = budget - sum(choice.nbytes for choice in at_base)
        self.nbytes = sum(a.nbytes - b.nbytes for a, b in zip(at_levels, at_base, strict=True))
        self.loss = fsum(a.loss - b.loss for a, b in zip(at_levels, at_base, strict=True))
        scale = fsum(abs(choice.loss) for choice in at_base)
        self.tie = TIE * max(scale, -self.loss)


@dataclass(frozen=True)
class _CoreItem:
    """Alternatives of one item relative to its base choice, which is row 0."""

    index: int
    levels: tuple[int, ...]
    nbytes: NDArray[np.int64]
    loss: NDArray[np.float64]
    gain: float  # most loss saved per byte added
    cost: float  # least loss added per byte freed


def _core(menu: list[list[Choice]], base: list[int], price: float, limit: float) -> list[_CoreItem]:
    """Items with an alternative whose reduced cost is at most `limit`, closest calls first."""
    core: list[_CoreItem] = []
    for i, (choices, b) in enumerate(zip(menu, base, strict=True)):
        rows = [(b, 0, 0.0)]
        gain, cost = 0.0, inf
        for j, choice in enumerate(choices):
            nbytes, loss = choice.nbytes - choices[b].nbytes, choice.loss - choices[b].loss
            if j == b or loss + price * nbytes > limit:
                continue
            rows.append((j, nbytes, loss))
            if nbytes > 0:
                gain = max(gain, -loss / nbytes)
            else:
                cost = min(cost, loss / -nbytes)
        if len(rows) > 1:
            levels, sizes, losses = zip(*rows, strict=True)
            core.append(
                _CoreItem(i, levels, np.array(sizes, np.int64), np.array(losses), gain, cost)
            )
    # Both sides in turn: states near the budget then appear early and prune the rest.
    adds = sorted(core, key=lambda c: price - c.gain)
    frees = sorted(core, key=lambda c: c.cost - price)
    turns = (c for pair in zip(adds, frees, strict=True) for c in pair)
    return list({c.index: c for c in turns}.values())


def _search(
    menu: list[list[Choice]], base: list[int], price: float, best: _Incumbent, max_states: int
) -> float | None:
    """Improve `best` over the core. Returns None when it is proven optimal, else a lower bound
    (relative to the base loss) on every solution that was not looked at.
    """
    room = best.room
    excess = best.loss + price * room  # of the incumbent over the relaxation
    if excess <= best.tie:
        return None
    core = _core(menu, base, price, excess + best.tie)
    best.tie = max(best.tie, TIE * max((np.abs(c.loss).max() for c in core), default=0.0))
    # gains[d], costs[d]: the extremes over the items not yet decided at depth d
    gains = np.maximum.accumulate([0.0, *(c.gain for c in reversed(core))])[::-1]
    costs = np.minimum.accumulate([inf, *(c.cost for c in reversed(core))])[::-1]

    nbytes, loss = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    found: tuple[int, int] | None = None  # (core items decided, state)
    generated = 0
    unseen: float | None = None
    for depth, item in enumerate(core):
        if best.loss + price * room <= best.tie:
            break  # no solution can beat the relaxation
        generated += len(nbytes) * len(item.levels)
        if generated > max_states:
            unseen = float(_bounds(nbytes, loss, room, gains[depth], costs[depth]).min())
            break
        width = len(nbytes)
        nbytes = (item.nbytes[:, None] + nbytes).ravel()
        loss = (item.loss[:, None] + loss).ravel()
        bounds = _bounds(nbytes, loss, room, gains[depth + 1], costs[depth + 1])
        kept = np.flatnonzero(bounds <= best.loss + best.tie)
        kept = kept[np.lexsort((loss[kept], nbytes[kept]))]
        falling = np.ones(len(kept), bool)
        falling[1:] = loss[kept][1:] < np.minimum.accumulate(loss[kept])[:-1]
        kept = kept[falling]
        nbytes, loss = nbytes[kept], loss[kept]
        history.append(((kept % width).astype(np.int32), (kept // width).astype(np.int16)))
        state = _better(nbytes, loss, best)
        if state is not None:
            found = (len(history), state)
        if not len(kept):
            break
    if found is not None:
        levels = list(base)
        depth, state = found
        for item, (parent, row) in zip(core[:depth][::-1], history[:depth][::-1], strict=True):
            levels[item.index] = item.levels[row[state]]
            state = int(parent[state])
        best.levels = levels
    return unseen


def _bounds(
    nbytes: NDArray[np.int64], loss: NDArray[np.float64], room: int, gain: float, cost: float
) -> NDArray[np.float64]:
    """Least loss any completion of each state can reach."""
    left = room - nbytes
    bounds = loss - gain * np.maximum(left, 0)
    over = left < 0
    bounds[over] += cost * -left[over]
    return bounds


def _better(nbytes: NDArray[np.int64], loss: NDArray[np.float64], best: _Incumbent) -> int | None:
    """The state that replaces the incumbent, which is updated; None when there is none.

    States are sorted by rising bytes and falling loss, so the last one that fits loses least.
    """
    fitting = int(np.searchsorted(nbytes, best.room, side="right"))
    if not fitting:
        return None
    lowest = loss[fitting - 1]
    state = fitting - 1 - int(np.searchsorted(loss[:fitting][::-1], lowest + best.tie, "right") - 1)
    lower = loss[state] < best.loss - best.tie
    if not lower and (loss[state] > best.loss + best.tie or nbytes[state] >= best.nbytes):
        return None
    best.loss, best.nbytes = float(loss[state]), int(nbytes[state])
    return state
