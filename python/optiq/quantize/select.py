"""Real KL decides: proposed plans are rendered and measured, and the best is taken.

Measured is KL(source || rendered) in nats per token on text that neither scores nor rounding saw
("selection" of `calibration.split`). Of the source's runs only the inputs of its output head are
kept; logits are made of them a few rows at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import inf, isfinite
from pathlib import Path

import mlx.nn as nn
import numpy as np

from ..base.progress import Progress, tell
from ..calibration import Sample, token_hash
from ..errors import UsageError
from ..formats import DENSE, Format
from ..models.places import place_at
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
from .rounding.render import render_model
from .rounding.weights import MINMAX, Rounding, round_weight

Refine = Callable[[Plan, Rounding], Rounding]

# A model up to this size is kept in memory while it is measured.
SMALL_BYTES = 1 << 30

# Measured over predicted KL; outside, the scores say little about this model.
USUAL_RATIO = (0.5, 2.5)


class Judge:
    """Measures students of `source` on `sequences`; a context manager.

    Of the models that run, one block and the head are in memory at a time; all of models that are
    small (`SMALL_BYTES`), whose blocks then run as a whole, which is faster.
    """

    def __init__(self, source: Source, sequences: Sequence[Sample]) -> None:
        model = load(source).model
        self.sequences = sequences
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
        texts = [s.tokens for s in self.sequences]
        return self._teacher.record_together(texts, after=self._drop, thin=True)

    @metal.restarts
    def measure(self, plan: Plan, rounding: Rounding = MINMAX) -> Mean:
        """KL of the model that `plan` describes, in nats per token."""
        return self.measure_model(*self.rendered(plan, rounding))

    def rendered(self, plan: Plan, rounding: Rounding = MINMAX) -> tuple[nn.Module, Drop]:
        """The model that `plan` describes, to be run once, and how it drops its blocks."""
        small, loaded = self._small, load(self._source)
        student = render_model(loaded, plan, rounding=rounding, blocks=small, lazy=not small)
        return student, keep if small else Passing(student).drop

    def rounded(self, plans: Iterable[Plan], rounding: Rounding) -> Rounding:
        """`rounding` with what `plans` have in common rounded once, where that fits in memory."""
        if not self._small:
            return rounding
        formats: dict[str, set[Format]] = defaultdict(set)
        for planned in chain.from_iterable(plan.modules for plan in plans):
            if planned.format != DENSE:
                formats[planned.module.path].add(planned.format)
        model, fitted = load(self._source).model, dict(rounding.fitted)
        for path, wanted in formats.items():
            place = place_at(model, path)
            weight = place.get().weight
            for fmt in wanted:
                fitted[path, fmt] = round_weight(weight, fmt, rounding, path)
            place.set(nn.Module())  # the dense weight is dropped here
        return replace(rounding, fitted=fitted)

    def opened(self, folder: Path) -> tuple[nn.Module, Drop]:
        """An exported model, to be run once, and how it drops its blocks."""
        student = load(resolve(str(folder)), allow_quantized=True).model
        accelerate(student, blocks=self._small, exact=False)
        return student, keep if self._small else Passing(student).drop

    @metal.restarts
    def measure_model(self, student: nn.Module, drop: Drop = keep) -> Mean:
        """KL of a student, which is a model of the same architecture; `drop` is its own."""
        totals: list[float] = []
        for tape, student_output in zip(self._tapes, self._outputs(student, drop), strict=True):
            teacher = (tape.hidden, None)
            totals += divergences(self._teacher, tape, teacher, [student_output])
        self._drop(None)
        return Mean(*mean_per_token(totals, [len(s.tokens) for s in self.sequences]))

    @metal.restarts
    def compare(self, name: str, student: nn.Module, drop: Drop = keep) -> Divergence:
        """All that is said of how far a student is from the source, over the next tokens."""
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
        return divergence.summary(table, token_hash(self.sequences))

    def _outputs(self, student: nn.Module, drop: Drop) -> list[Output]:
        """What a student's head gets in each sequence, and that head."""
        with Replay(student, self._modules) as replay:
            head = replay.place(self._head).get() if self._head else None
            texts = [s.tokens for s in self.sequences]
            runs = replay.record_together(texts, after=drop, thin=True)
            return [(run.hidden, head) for run in runs]


def decide(
    source: Source,
    plans: Mapping[str, Plan],
    rounding: Rounding,
    sequences: Sequence[Sample],
    fit: Callable[[Plan], Rounding] | None = None,
    *,
    refine: Refine | None = None,
    progress: bool = True,
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
    with Judge(source, sequences) as judge:

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
