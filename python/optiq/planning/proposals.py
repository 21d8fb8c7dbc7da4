"""Plans worth measuring: the one of least predicted KL, and others that trust the scores less.

A sum of scores ranks plans well but not perfectly: scores are noisy, and an optimum over noisy
numbers favours those that came out too small. So a handful of plans of the same size is proposed,
and what the whole model really loses decides between them (selection.py). Tables in, tables out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from statistics import median

from ..errors import BudgetError
from ..formats import DENSE, Format
from .allocation import allocate
from .plan import Plan, build, choices, planned_modules, problem
from .scores import Score, Scored, Scores
from .size import Size

Menu = Sequence[Format] | None
Formats = Mapping[str, Format]  # by module path

# A score below this (nats per token) is taken for this where its logarithm is.
LEAST = 1e-9


def propose(
    scores: Scores, size: Size, menu: Menu = None, *, seed: int = 0, command: str = ""
) -> dict[str, Plan]:
    """Plans within `size` by name; the first, "scores", is that of `plan.build`.

    - "smooth": scores are replaced by the best product of a sensitivity per module and an error
      per format, which averages their noise away.
    - "wide": no format below 4 bits.
    - "uniform": the widest format that fits for all modules.

    A plan that equals an earlier one is left out, as is one that has no solution. Predicted KL is
    always the sum of the scores as they are. Raises as `plan.build` does.
    """
    base = build(scores, size, menu, seed=seed, command=command)
    plans = {"scores": base}
    for name, make in _VARIANTS.items():
        try:
            formats = make(scores, size, menu)
        except BudgetError:
            continue
        if formats is not None:
            plans[name] = _planned(base, scores, formats)
    seen: list[list[Format]] = []
    for name in list(plans):
        formats_of = [m.format for m in plans[name].modules]
        if formats_of in seen:
            del plans[name]
        seen.append(formats_of)
    return plans


def _smooth(scores: Scores, size: Size, menu: Menu) -> Formats:
    logs = {
        scored.module.path: {
            f: log(max(score.kl, LEAST)) for f, score in scored.scores.items() if f != DENSE
        }
        for scored in scores.modules
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

    def loss(scored: Scored, fmt: Format, score: Score) -> float:
        at = of_module.get(scored.module.path, 0.0)
        return score.kl if fmt == DENSE else exp(at + of_format[fmt])

    return _allocated(_with_losses(scores, loss), size, menu)


def _wide(scores: Scores, size: Size, menu: Menu) -> Formats | None:
    formats = _menu(scores, menu)
    wide = [f for f in formats if f.bits >= 4]
    return _allocated(scores, size, wide) if wide and len(wide) < len(formats) else None


def _uniform(scores: Scores, size: Size, menu: Menu) -> Formats | None:
    _, budget = problem(scores, size, menu)
    itemsize, fixed = scores.model.itemsize, scores.model.fixed_bytes
    best: tuple[int, Formats] | None = None
    for fmt in _menu(scores, menu):
        formats: dict[str, Format] = {}
        nbytes = fixed
        for scored in scores.modules:
            shape = scored.module.shape
            own = choices(scored, menu)
            wider = [f for f in own if f.bits >= fmt.bits] or own
            used = fmt if fmt in own else min(wider, key=lambda f: f.nbytes(shape, itemsize))
            formats[scored.module.path] = used
            nbytes += used.nbytes(shape, itemsize)
        if nbytes <= budget and (best is None or nbytes > best[0]):
            best = nbytes, formats
    return best[1] if best else None


_VARIANTS: dict[str, Callable[[Scores, Size, Menu], Formats | None]] = {
    "smooth": _smooth,
    "wide": _wide,
    "uniform": _uniform,
}


def _menu(scores: Scores, menu: Menu) -> list[Format]:
    return sorted({f for s in scores.modules for f in s.scores} if menu is None else menu)


def _with_losses(scores: Scores, loss: Callable[[Scored, Format, Score], float]) -> Scores:
    """The same modules with other losses for their scores."""
    modules = (
        replace(
            s, scores={f: replace(score, kl=loss(s, f, score)) for f, score in s.scores.items()}
        )
        for s in scores.modules
    )
    return replace(scores, modules=tuple(modules))


def _allocated(scores: Scores, size: Size, menu: Menu) -> Formats:
    return allocate(*problem(scores, size, menu)).formats


def _planned(base: Plan, scores: Scores, formats: Formats) -> Plan:
    plan = replace(base, modules=planned_modules(scores, formats))
    predicted, bound = plan.predicted_kl or 0.0, base.bound or 0.0
    return replace(plan, gap=(predicted - bound) / bound if bound > 0 else None)
