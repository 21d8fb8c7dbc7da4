"""A measurement as rounds, each by one method; in `auto` one decides what comes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import fsum

from ...base.progress import tell
from ...errors import BudgetError
from ...formats import DENSE, Format
from ...models.roles import Module, Role
from ...planning.contested import Contest, contests
from ...planning.scores import Score, Scored, Scores, Settled
from ...planning.size import Size
from ...quality.statistics import mean_per_token
from .fisher import scorable, score_by_fisher
from .job import Job
from .kl import runs, score_by_kl

# What `auto` may spend on contested modules: a share of the block runs that exact scores of all
# that it estimates would take.
EXACT_SHARE = 0.02

_METHODS = {"kl": score_by_kl, "fisher": score_by_fisher}

Formats = Mapping[str, tuple[Format, ...]]


class Rounds:
    """Runs rounds of `job`, whose formats are all that are to be scored, and keeps the scores."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._scores: dict[str, dict[Format, Score]] = {
            path: {DENSE: Score(0.0, 0.0, 0.0)} if DENSE in formats else {}
            for path, formats in job.formats.items()
        }
        self._count = 0

    def run(self, method: str, formats: Formats, at: Size | None = None) -> None:
        """Score these formats of these modules; the scores replace those of earlier rounds.

        `at` is the size that the work depends on, if it does.
        """
        name = " ".join([str(self._count), method, *([f"at {at}"] if at else [])])
        job = replace(self.job, formats=dict(formats), name=name)
        self._count += 1
        if not job.blocks():
            return
        _METHODS[method](job)
        lengths = [len(tokens) for tokens in job.sequences]
        heads = {m.path for m in job.modules if m.role is Role.HEAD}  # exact by either method
        for path, columns in job.collect().items():
            made = "kl" if path in heads else method
            for fmt, totals in columns.items():
                kl, se = mean_per_token(totals, lengths)
                mse = job.weight_error(path, fmt)
                flips = job.flips(path, fmt)
                self._scores[path][Format.parse(fmt)] = Score(kl, se, mse, made, flips)

    def fill(self, scores: Scores) -> Scores:
        """`scores` with the modules as far as they are scored."""
        formats = self.job.formats
        modules = (
            Scored(m, {f: known[f] for f in formats[m.path] if f in known})
            for m in self.job.modules
            for known in [self._scores[m.path]]
        )
        return replace(scores, modules=tuple(modules))

    def cost(self, formats: Formats) -> int:
        """Block runs on one sequence that exact scores take."""
        job = replace(self.job, formats=dict(formats))
        return sum(runs(job, m) for m in job.modules)

    def of(self, choose: Callable[[Module], bool]) -> Formats:
        """All formats of the modules that are chosen."""
        return {m.path: self.job.formats[m.path] for m in self.job.modules if choose(m)}


def smooth(module: Module) -> bool:
    """Whether `auto` estimates the module: that a router picks other experts has no gradient."""
    return module.role not in (Role.EXPERT, Role.ROUTER)


def measure_auto(rounds: Rounds, scores: Scores, size: Size) -> Settled:
    """Estimate what is smooth, measure the rest, then measure what is still open at `size`.

    `scores` is all that is known but the modules.
    """
    job = rounds.job
    called = scorable(job)
    estimated = rounds.of(lambda m: smooth(m) and m.path in called)
    rounds.run("fisher", estimated)
    rounds.run("kl", rounds.of(lambda m: m.path not in estimated))
    full = rounds.cost(rounds.of(lambda m: smooth(m) and m.role is not Role.HEAD))
    say = partial(tell, enabled=job.progress)
    spent, measured = 0, set[str]()
    while True:
        try:
            found = contests(rounds.fill(scores), size)
        except BudgetError as error:
            say(f"no module is measured exactly, because there is no plan yet: {error}")
            return Settled(size.text, 0, 0.0, None, None)
        work, cost = _affordable(rounds, found, EXACT_SHARE * full - spent)
        # One rank decides for all: on unlike machines the last bit of a sum may differ.
        decision = [work, cost, len(found), fsum(contest.gain for contest in found)]
        work, cost, contested, gain = job.world.gather(decision)[0]
        if not work:
            break
        chosen = {path: tuple(map(Format.parse, names)) for path, names in work.items()}
        rounds.run("kl", chosen, size)
        spent += cost
        measured |= work.keys()
    share = spent / full if full else 0.0
    if contested:
        say(
            f"{len(measured)} of {len(job.modules)} modules are measured exactly, the others "
            f"estimated; the formats of {contested} are still open, worth at most {gain:.2g} nats "
            "(--sensitivity kl measures all)"
        )
    return Settled(size.text, len(measured), share, contested, gain)


def _affordable(
    rounds: Rounds, found: list[Contest], limit: float
) -> tuple[dict[str, list[str]], int]:
    """The formats to measure within `limit` block runs, most nats a run first, and their runs."""
    costs = {c.path: rounds.cost({c.path: c.formats}) for c in found}
    work, spent = {}, 0
    for contest in sorted(found, key=lambda c: c.gain / costs[c.path], reverse=True):
        if spent + costs[contest.path] <= limit:
            spent += costs[contest.path]
            work[contest.path] = [str(fmt) for fmt in contest.formats]
    return work, spent
