"""Formats for all slots within a budget: a handful of proposals. Tables in, tables out.

A sum of scores ranks plans well but not perfectly, so several are proposed, uniform widths among
them, and what the whole model really loses decides (see plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import fsum
from statistics import median

from ...errors import BudgetError
from ...formats import DENSE, Format
from ...kv.report import SlotScore, SlotScores
from ...planning.allocation import Choice, Item, allocate
from .slots import ENDS, Slot, Width

Formats = dict[str, Format]  # by slot
Loss = Callable[[SlotScore], float]

BUDGETS = 13  # points of the predicted frontier


def propose(
    slots: Sequence[Slot], scores: SlotScores, budget: int, asked: str = ""
) -> dict[str, Formats]:
    """Formats within `budget` bytes by name, each proposal once.

    - "scores": the least sum of scores. The first and the last cache keep 8 bits or more, unless
      fewer are measured safe.
    - "cautious": the same, but every score counts with two standard errors on top.
    - "free": the least sum of scores without a floor for the ends.
    - "uniform": of one width for all keys and one for all values, the pair of least sum.
    - `asked`, if it is such a pair and fits ("8/4").

    Raises BudgetError when there is none (see `check_budget`).
    """

    def within(formats: Formats | None) -> Formats | None:
        return formats if formats and size(slots, formats) <= budget else None

    makers: dict[str, Callable[[], Formats | None]] = {
        "scores": lambda: solve(slots, scores, budget),
        "cautious": lambda: solve(slots, scores, budget, loss=_upper),
        "free": lambda: solve(slots, scores, budget, ends=False),
        "uniform": lambda: uniform(slots, scores, budget),
        asked: lambda: within(pairs(slots, scores).get(asked)),
    }
    found: dict[str, Formats] = {}
    refusal: BudgetError | None = None
    for name, make in makers.items():
        try:
            formats = make()
        except BudgetError as error:
            refusal = error
            continue
        if formats is not None and formats not in found.values():
            found[name] = formats
    if not found:
        raise refusal or BudgetError("no formats fit the budget")
    return found


def check_budget(slots: Sequence[Slot], menu: Sequence[Width], budget: int) -> None:
    """Raise BudgetError if even the narrowest formats take more than `budget` bytes."""
    least = sum(min(map(slot.nbytes, slot.offered(menu))) for slot in slots)
    if least > budget:
        raise BudgetError(
            f"the cache needs {least:,} bytes at least and --size gives {budget:,}; raise --size "
            "or add narrower --formats (keys take 4 bits or more)"
        )


def solve(
    slots: Sequence[Slot],
    scores: SlotScores,
    budget: int,
    *,
    loss: Loss = lambda s: s.kl,
    ends: bool = True,
) -> Formats:
    """The formats of least summed loss within `budget` bytes; raises BudgetError."""
    safe = safe_ends(slots, scores) if ends else None
    items = []
    for slot in slots:
        row = scores[slot.name]
        allowed = [f for f in row if safe is None or not slot.end or f in safe[slot.name]]
        items.append(
            Item(slot.name, tuple(Choice(f, slot.nbytes(f), loss(row[f])) for f in allowed))
        )
    return allocate(items, budget).formats


def safe_ends(slots: Sequence[Slot], scores: SlotScores) -> dict[str, list[Format]]:
    """Formats that each slot of the first and the last cache may have.

    Those of 8 bits or more, and what two standard errors above its score is still no worse than the
    middle one of the same side's scores at that width. All of them where no format has 8 bits.
    """
    found = {}
    for end in (slot for slot in slots if slot.end):
        row = scores[end.name]
        kept = []
        for fmt in row:
            others = [
                score.kl
                for s in slots
                if s.side == end.side and not s.end
                for f, score in scores[s.name].items()
                if f.bits == fmt.bits
            ]
            safe = bool(others) and _upper(row[fmt]) <= median(others)
            if fmt.bits >= ENDS or safe:
                kept.append(fmt)
        found[end.name] = kept or list(row)
    return found


def uniform(slots: Sequence[Slot], scores: SlotScores, budget: int) -> Formats | None:
    """One width for keys and one for values: the pair of least predicted KL within `budget`."""
    best: tuple[float, int, Formats] | None = None
    for formats in pairs(slots, scores).values():
        nbytes, kl = size(slots, formats), predicted(scores, formats)
        if nbytes <= budget and (best is None or (kl, nbytes) < best[:2]):
            best = kl, nbytes, formats
    return best[2] if best else None


def pairs(slots: Sequence[Slot], scores: SlotScores) -> dict[str, Formats]:
    """Every pair of one width for keys and one for values that all slots have: "8/4", ..."""
    by_bits = {slot.name: {f.bits: f for f in reversed(scores[slot.name])} for slot in slots}
    common = {
        side: sorted(set.intersection(*(set(by_bits[s.name]) for s in slots if s.side == side)))
        if any(s.side == side for s in slots)
        else [DENSE.bits]
        for side in ("k", "v")
    }
    return {
        f"{k}/{v}": {s.name: by_bits[s.name][k if s.side == "k" else v] for s in slots}
        for k, v in product(common["k"], common["v"])
    }


def frontier(slots: Sequence[Slot], scores: SlotScores) -> list[tuple[int, float]]:
    """(bytes, least predicted KL) from the smallest cache to the widest."""
    sizes = [[slot.nbytes(f) for f in scores[slot.name]] for slot in slots]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    found = {}
    for i in range(BUDGETS):
        formats = solve(slots, scores, low + (high - low) * i // (BUDGETS - 1), ends=False)
        found[size(slots, formats)] = predicted(scores, formats)
    return sorted(found.items())


def size(slots: Sequence[Slot], formats: Mapping[str, Format]) -> int:
    """Bytes after the context."""
    return sum(slot.nbytes(formats[slot.name]) for slot in slots)


def predicted(scores: SlotScores, formats: Mapping[str, Format]) -> float:
    """The sum of scores, in nats per token."""
    return fsum(scores[name][fmt].kl for name, fmt in formats.items())


def _upper(score: SlotScore) -> float:
    return score.kl + 2 * (score.se or 0.0)
