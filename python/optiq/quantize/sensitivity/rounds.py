"""A measurement as rounds, each of some modules by one method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ...formats import DENSE, Format
from ...models.roles import Module, Role
from ...planning.scores import Score, Scored, Scores
from ...quality.statistics import mean_per_token
from .fisher import scorable, score_by_fisher
from .job import Job
from .kl import score_by_kl

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

    def run(self, method: str, formats: Formats) -> None:
        """Score these formats of these modules."""
        job = replace(self.job, formats=dict(formats), name=f"{self._count} {method}")
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

    def of(self, choose: Callable[[Module], bool]) -> Formats:
        """All formats of the modules that are chosen."""
        return {m.path: self.job.formats[m.path] for m in self.job.modules if choose(m)}


def smooth(module: Module) -> bool:
    """Whether `auto` estimates the module: that a router picks other experts has no gradient."""
    return module.role not in (Role.EXPERT, Role.ROUTER)


def exact(modules: Iterable[Module], method: str) -> bool:
    """Whether `method` measures some of the modules, for which the model runs as a whole."""
    return method == "kl" or (method == "auto" and not all(map(smooth, modules)))


def measure_auto(rounds: Rounds) -> None:
    """Estimate what is smooth and measure the rest."""
    called = scorable(rounds.job)
    estimated = rounds.of(lambda m: smooth(m) and m.path in called)
    rounds.run("fisher", estimated)
    rounds.run("kl", rounds.of(lambda m: m.path not in estimated))
