"""Real KL decides: proposed plans are rendered and measured, and the best is taken.

Measured is KL(source || rendered) in nats per token on text that neither scores nor rounding saw
("selection" of `calibration.split`). Of the source's runs only the inputs of its output head are
kept; logits are made of them a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path

import mlx.nn as nn
import numpy as np

from ..base.progress import Progress, tell
from ..calibration import Sample, token_hash
from ..distributed.ranks import ALONE, World
from ..errors import UsageError
from ..models.roles import is_head, quantizable
from ..nn.accelerate import accelerate
from ..nn.replay import Replay, Tape
from ..ops import metal
from ..planning.plan import Candidate, Plan, Selection
from ..quality import divergence
from ..quality.results import Divergence, Mean
from ..quality.statistics import mean_per_token, rank_correlation
from ..sources import Source, load, resolve
from .replay.logits import LOGITS_BYTES, Output, divergences
from .replay.streamed import Drop, Passing, Streamed, keep
from .rounding.reference import weight_bytes
from .rounding.render import render_model, rounded_together
from .rounding.weights import MINMAX, Rounding

Refine = Callable[[Plan, Rounding], Rounding]

# A model up to this size is kept in memory while it is measured.
SMALL_BYTES = 1 << 30

# Measured over predicted KL; outside, the scores say little about this model.
USUAL_RATIO = (0.5, 2.5)


class Judge:
    """Measures students of `source` on `sequences`; a context manager.

    The ranks of `world` divide the sequences, and each finds the same for all of them.
    Of the models that run, one block and the head are in memory at a time; all of models that are
    small (`SMALL_BYTES`), whose blocks then run as a whole, which is faster.
    """

    def __init__(self, source: Source, sequences: Sequence[Sample], world: World = ALONE) -> None:
        model = load(source).model
        self.sequences = sequences
        self._world = world
        self._own = world.share([len(s.tokens) for s in sequences])
        self._source = source
        self._modules = quantizable(model)
        self._head = next((m.path for m in self._modules if is_head(m)), None)
        self._small = weight_bytes(model) <= SMALL_BYTES
        accelerate(model, blocks=self._small, exact=False)
        self._drop = keep if self._small else Streamed(source, model).drop
        self._teacher = Replay(model, self._modules)
        self._tapes: list[Tape] = []

    def __enter__(self) -> Judge:
        self._teacher.__enter__()
        self._tapes = self._record()
        return self

    def __exit__(self, *exception: object) -> None:
        self._teacher.__exit__(*exception)

    @metal.restarts
    def _record(self) -> list[Tape]:
        return self._teacher.record_together(self._texts(), after=self._drop, thin=True)

    def measure(self, plan: Plan, rounding: Rounding = MINMAX) -> Mean:
        """KL of the model that `plan` describes, in nats per token."""
        return self.measure_model(*self.rendered(plan, rounding))

    def rendered(self, plan: Plan, rounding: Rounding = MINMAX) -> tuple[nn.Module, Drop]:
        """The model that `plan` describes, to be run once, and how it drops its blocks."""
        small, loaded = self._small, load(self._source)
        if self._world.size > 1:
            rounding = self.rounded([plan], rounding)
        student = render_model(loaded, plan, rounding=rounding, blocks=small, lazy=not small)
        return student, keep if small else Passing(student).drop

    def rounded(self, plans: Iterable[Plan], rounding: Rounding) -> Rounding:
        """`rounding` with a small model's weights in it as `plans` need them, each rounded once."""
        return (
            rounded_together(self._source, plans, rounding, self._world)
            if self._small
            else rounding
        )

    def opened(self, folder: Path) -> tuple[nn.Module, Drop]:
        """An exported model, to be run once, and how it drops its blocks."""
        student = load(resolve(str(folder)), allow_quantized=True).model
        accelerate(student, blocks=self._small, exact=False)
        return student, keep if self._small else Passing(student).drop

    def measure_model(self, student: nn.Module, drop: Drop = keep) -> Mean:
        """KL of a student, which is a model of the same architecture; `drop` is its own."""
        own = dict(zip(self._own, self._totals(student, drop), strict=True))
        totals = self._world.join(own)
        return Mean(*mean_per_token(totals, [len(s.tokens) for s in self.sequences]))

    @metal.restarts
    def _totals(self, student: nn.Module, drop: Drop) -> list[float]:
        """KL summed over each of this rank's sequences."""
        totals: list[float] = []
        for tape, student_output in zip(self._tapes, self._outputs(student, drop), strict=True):
            teacher = (tape.hidden, None)
            totals += divergences(self._teacher, tape, teacher, [student_output])
        self._drop(None)
        return totals

    def compare(self, name: str, student: nn.Module, drop: Drop = keep) -> Divergence:
        """All that is said of how far a student is from the source, over the next tokens."""
        own = self._columns(name, student, drop)
        return summary_of_all(self._world, self._own, own, self.sequences)

    @metal.restarts
    def _columns(self, name: str, student: nn.Module, drop: Drop) -> divergence.Table:
        """`divergence.compare_rows` of each of this rank's sequences."""
        table: divergence.Table = []
        for tape, (hidden, head) in zip(self._tapes, self._outputs(student, drop), strict=True):
            tokens = tape.tokens[0]
            parts = []
            last = len(tokens) - 1  # nothing follows the last token
            for start, stop, _ in (rows.indices(last) for rows in tape.chunks(LOGITS_BYTES)):
                if start < stop:
                    p, q = (
                        self._teacher.logits(tape, h[0, start:stop], by)
                        for h, by in ((tape.hidden, None), (hidden, head))
                    )
                    following = tokens[start + 1 : stop + 1]
                    parts.append(divergence.compare_rows(name, p, q, following))
            table.append(np.concatenate(parts, axis=1))
        self._drop(None)
        return table

    def _outputs(self, student: nn.Module, drop: Drop) -> list[Output]:
        """What a student's head gets in each sequence, and that head."""
        with Replay(student, self._modules) as replay:
            head = replay.place(self._head).get() if self._head else None
            runs = replay.record_together(self._texts(), after=drop, thin=True)
            return [(run.hidden, head) for run in runs]

    def _texts(self) -> list[list[int]]:
        return [self.sequences[i].tokens for i in self._own]


def summary_of_all(
    world: World, own: Sequence[int], table: divergence.Table, sequences: Sequence[Sample]
) -> Divergence:
    """The figures of all `sequences`, of which this rank has the `table` of its `own`."""
    columns = (of.tolist() for of in table)
    joined = world.join(dict(zip(own, columns, strict=True)))
    return divergence.summary([np.array(of) for of in joined], token_hash(sequences))


def decide(
    source: Source,
    plans: Mapping[str, Plan],
    rounding: Rounding,
    sequences: Sequence[Sample],
    fit: Callable[[Plan], Rounding] | None = None,
    *,
    refine: Refine | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> tuple[Plan, Rounding]:
    """The plan of least measured KL, and `rounding` or what `fit` makes of it, whichever is better.

    `refine` then makes another one of that, which is taken if it is better still. What was measured
    goes into the plan's `selection`. Without sequences the first plan is taken unmeasured, `fit` is
    trusted, and `refine`, which is not, raises UsageError.
    """
    chosen = next(iter(plans))
    if not sequences:
        if refine:
            raise UsageError(
                "--refine is kept only where it lowers measured KL, and there is not enough text "
                "to measure; leave it out, or add --calibration rows"
            )
        plan = plans[chosen]
        rounding = fit(plan) if fit else rounding
        return replace(plan, selection=Selection(chosen, rounding.method)), rounding
    candidates: list[Candidate] = []
    with Judge(source, sequences, world) as judge:

        def measure(name: str, rounding: Rounding) -> float:
            plan = plans[name]
            kl = judge.measure(plan, rounding)
            if not isfinite(kl.mean):  # the plan makes the model overflow
                return inf
            candidates.append(Candidate(name, rounding.method, plan.nbytes, plan.predicted_kl, kl))
            return kl.mean

        found: dict[str, float] = {}
        with Progress(len(plans), "choosing formats", enabled=progress) as bar:
            searched = judge.rounded(plans.values(), rounding)
            for name in plans:
                found[name] = measure(name, searched)
                bar.step(note=f"{name}: {found[name]:.4g}")
            del searched
        chosen = min(plans, key=lambda name: (found[name], plans[name].nbytes))
        ratio, rank = _trust(candidates, chosen)
        plan, least = plans[chosen], found[chosen]
        if fit:
            fitted = fit(plan)
            if fitted.fitted and (kl := measure(chosen, fitted)) < least:
                rounding, least = fitted, kl
        if refine:
            refined = refine(plan, rounding)
            if refined is not rounding and measure(chosen, refined) < least:
                rounding = refined
    selection = Selection(
        chosen,
        rounding.method,
        tuple(candidates),
        tokens=sum(len(s.tokens) for s in sequences),
        sequences=len(sequences),
        text_sha256=token_hash(sequences),
        ratio=ratio,
        rank_correlation=rank,
    )
    return replace(plan, selection=selection), rounding


def _trust(candidates: Sequence[Candidate], chosen: str) -> tuple[float | None, float | None]:
    """How well predicted KL foretold the measured one: their ratio for the chosen plan, and the
    rank correlation over all.
    """
    pairs = {c.name: (c.predicted, c.kl.mean) for c in candidates if c.predicted}
    predicted, measured = pairs.get(chosen, (None, 0.0))
    ratio = measured / predicted if predicted else None
    low, high = USUAL_RATIO
    if ratio is not None and not low <= ratio <= high:
        tell(
            f"the chosen plan's KL is {ratio:.2g} times what its scores predict; usual is {low} to "
            f"{high}: more calibration --tokens or --sensitivity kl may find a better one"
        )
    return ratio, rank_correlation(pairs.values())
