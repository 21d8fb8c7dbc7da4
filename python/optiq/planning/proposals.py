"""Plans worth measuring: the one of least predicted KL, and others that trust the scores less.

A sum of scores ranks plans well but not perfectly: scores are noisy, and an optimum over noisy
numbers favours those that came out too small. So a handful of plans of the same size is proposed,
and what the whole model really loses decides between them (selection.py). Tables in, tables out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, fsum, log
from statistics import median
from typing import Any

from ..errors import BudgetError
from ..formats import DENSE, Format
from ..models.roles import allowed
from .allocation import Choice, Item, allocate
from .plan import Plan, Planned, build, problem
from .scores import Scored, Scores, parse

Json = dict[str, Any]
Losses = Mapping[Format, float]

# A score below this (nats per token) is taken for this where its logarithm is.
LEAST = 1e-9


def propose(
    scores: Json,
    size: str = "uniform4",
    menu: Sequence[Format] | None = None,
    *,
    seed: int = 0,
    command: str = "",
) -> dict[str, Plan]:
    """Plans within `size` by name; the first, "scores", is that of `plan.build`.

    - "coupled": modules that share an input share a format, too.
    - "cautious": every score counts with two standard errors on top.
    - "smooth": scores are replaced by the best product of a sensitivity per module and an error
      per format, which averages their noise away.
    - "wide": no format below 4 bits.
    - "uniform": the widest format that fits for all modules.

    A plan that equals an earlier one is left out, as is one that has no solution. Predicted KL is
    always the sum of the scores as they are. Raises as `plan.build` does.
    """
    base = build(scores, size, menu, seed=seed, command=command)
    read = parse(scores)
    plans = {"scores": base}
    for name, make in _VARIANTS.items():
        try:
            formats = make(read, size, menu, base.budget)
        except BudgetError:
            continue
        if formats is not None:
            plans[name] = _planned(base, read, formats)
    seen: list[list[Format]] = []
    for name in list(plans):
        formats_of = [m.format for m in plans[name].modules]
        if formats_of in seen:
            del plans[name]
        seen.append(formats_of)
    return plans


Formats = Mapping[str, Format]
Variant = Callable[[Scores, str, Sequence[Format] | None, int], Formats | None]


def _coupled(read: Scores, size: str, menu: Sequence[Format] | None, budget: int) -> Formats:
    items, _ = problem(read, size, menu)
    rest, choices = items[0], {item.name: item.choices for item in items}
    units: dict[str, list[str]] = defaultdict(list)
    for scored in read.modules:
        units[scored.module.unit].append(scored.module.path)
    joint = [rest]
    for unit, paths in units.items():
        by_format = [{c.format: c for c in choices[path]} for path in paths]
        common = [f for f in by_format[0] if all(f in other for other in by_format)]
        if not common:  # experts and a dense sibling, say
            joint += [Item(path, choices[path]) for path in paths]
            continue
        sums = (
            Choice(f, sum(of[f].nbytes for of in by_format), fsum(of[f].loss for of in by_format))
            for f in common
        )
        joint.append(Item(unit, tuple(sums)))
    found = allocate(joint, budget).formats
    return {path: found.get(unit) or found[path] for unit, paths in units.items() for path in paths}


def _cautious(read: Scores, size: str, menu: Sequence[Format] | None, budget: int) -> Formats:
    def losses(scored: Scored) -> Losses:
        return {f: kl + 2 * (scored.errors.get(f) or 0.0) for f, kl in scored.losses.items()}

    return _allocated(_with(read, losses), size, menu)


def _smooth(read: Scores, size: str, menu: Sequence[Format] | None, budget: int) -> Formats:
    logs = {
        scored.module.path: {
            f: log(max(kl, LEAST)) for f, kl in scored.losses.items() if f != DENSE
        }
        for scored in read.modules
    }
    of_format: dict[Format, float] = defaultdict(float)
    of_module: dict[str, float] = {}
    for _ in range(20):  # median polish (Tukey 1977) of log kl = module + format
        of_module = {
            path: median(x - of_format[f] for f, x in row.items())
            for path, row in logs.items()
            if row
        }
        rest: dict[Format, list[float]] = defaultdict(list)
        for path, row in logs.items():
            for f, x in row.items():
                rest[f].append(x - of_module[path])
        of_format = defaultdict(float, {f: median(xs) for f, xs in rest.items()})

    def losses(scored: Scored) -> Losses:
        at = of_module.get(scored.module.path, 0.0)
        return {f: kl if f == DENSE else exp(at + of_format[f]) for f, kl in scored.losses.items()}

    return _allocated(_with(read, losses), size, menu)


def _wide(read: Scores, size: str, menu: Sequence[Format] | None, budget: int) -> Formats | None:
    formats = menu if menu is not None else sorted({f for s in read.modules for f in s.losses})
    wide = [f for f in formats if f.bits >= 4]
    return _allocated(read, size, wide) if wide and len(wide) < len(formats) else None


def _uniform(read: Scores, size: str, menu: Sequence[Format] | None, budget: int) -> Formats | None:
    itemsize, fixed = int(read.model["itemsize"]), int(read.model["fixed_bytes"])
    best: tuple[int, Formats] | None = None
    for fmt in sorted(menu if menu is not None else {f for s in read.modules for f in s.losses}):
        formats: dict[str, Format] = {}
        for scored in read.modules:
            choices = allowed(scored.module, sorted(scored.losses) if menu is None else menu)
            wider = [f for f in choices if f.bits >= fmt.bits]
            formats[scored.module.path] = (
                fmt
                if fmt in choices
                else min(wider or choices, key=lambda f: f.nbytes(scored.module.shape, itemsize))
            )
        nbytes = fixed + sum(
            formats[s.module.path].nbytes(s.module.shape, itemsize) for s in read.modules
        )
        if nbytes <= budget and (best is None or nbytes > best[0]):
            best = nbytes, formats
    return best[1] if best else None


_VARIANTS: dict[str, Variant] = {
    "coupled": _coupled,
    "cautious": _cautious,
    "smooth": _smooth,
    "wide": _wide,
    "uniform": _uniform,
}


def _with(read: Scores, losses: Callable[[Scored], Losses]) -> Scores:
    return replace(read, modules=tuple(replace(s, losses=losses(s)) for s in read.modules))


def _allocated(read: Scores, size: str, menu: Sequence[Format] | None) -> Formats:
    return allocate(*problem(read, size, menu)).formats


def _planned(base: Plan, read: Scores, formats: Formats) -> Plan:
    itemsize = int(read.model["itemsize"])
    modules = (
        Planned(
            s.module,
            formats[s.module.path],
            formats[s.module.path].nbytes(s.module.shape, itemsize),
            s.loss(formats[s.module.path]),
        )
        for s in read.modules
    )
    plan = replace(base, modules=tuple(modules))
    predicted, bound = plan.predicted_kl or 0.0, base.bound or 0.0
    return replace(plan, gap=(predicted - bound) / bound if bound > 0 else None)
