"""Real KL decides: proposed plans are rendered and measured, and the best is taken.

Measured is KL(source || rendered) in nats per token on text that neither scores nor rounding saw
("selection" of `calibration.split`). Of the source's runs only the inputs of its output head are
kept; logits are made of them a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..base.memory import available_memory
from ..base.progress import Progress, tell
from ..calibration import Sample, token_hash
from ..errors import UsageError
from ..models.roles import is_head, quantizable
from ..nn.accelerate import accelerate
from ..nn.replay import Replay, Tape
from ..ops import metal
from ..planning.plan import Candidate, Plan, Selection
from ..quality.results import Mean
from ..quality.statistics import mean_per_token, rank_correlation
from ..sources import Source, load
from .replay.logits import divergences
from .rounding.render import render_model
from .rounding.weights import Rounding

Refine = Callable[[Plan, Rounding], Rounding]

# Measured over predicted KL; outside, the scores say little about this model.
USUAL_RATIO = (0.5, 2.5)


class Judge:
    """Measures students of `source` on `sequences`; a context manager."""

    def __init__(self, source: Source, sequences: Sequence[Sample]) -> None:
        model = load(source).model
        self.sequences = sequences
        self._modules = quantizable(model)
        self._head = next((m.path for m in self._modules if is_head(m)), None)
        accelerate(model, exact=False)
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
        return [_thin(self._teacher.record(s.tokens)) for s in self.sequences]

    @metal.restarts
    def measure(self, student: nn.Module) -> Mean:
        """KL of a student, which is a model of the same architecture, in nats per token."""
        totals: list[float] = []
        with Replay(student, self._modules) as replay:
            head = replay.place(self._head).get() if self._head else None
            for tape, sample in zip(self._tapes, self.sequences, strict=True):
                hidden = replay.record(sample.tokens).hidden
                totals += divergences(self._teacher, tape, (tape.hidden, None), [(hidden, head)])
        return Mean(*mean_per_token(totals, [len(s.tokens) for s in self.sequences]))


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
    goes into the plan's `selection`. Without sequences, or where source and student do not fit the
    memory together, the first plan is taken unmeasured, `fit` is trusted, and `refine`, which is
    not, raises UsageError.
    """
    chosen = next(iter(plans))
    if not sequences or not _fit_memory(plans[chosen], copies=2 if fit or refine else 1):
        if refine:
            raise UsageError(
                "--refine is kept only where it lowers measured KL, and there is not enough text "
                "or memory to measure; leave it out, add --calibration rows or free memory"
            )
        plan = plans[chosen]
        rounding = fit(plan) if fit else rounding
        return replace(plan, selection=Selection(chosen, rounding.method)), rounding
    candidates: list[Candidate] = []
    with Judge(source, sequences) as judge:

        def measure(name: str, rounding: Rounding) -> float:
            plan = plans[name]
            kl = judge.measure(render_model(load(source), plan, rounding=rounding))
            if not isfinite(kl.mean):  # the plan makes the model overflow
                return inf
            candidates.append(Candidate(name, rounding.method, plan.nbytes, plan.predicted_kl, kl))
            return kl.mean

        found: dict[str, float] = {}
        with Progress(len(plans), "choosing formats", enabled=progress) as bar:
            for name in plans:
                found[name] = measure(name, rounding)
                bar.step(note=f"{name}: {found[name]:.4g}")
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


def _fit_memory(plan: Plan, copies: int) -> bool:
    """Whether a student and so many copies of the source do; fitting loads one of its own."""
    return copies * plan.dense_nbytes + plan.budget <= available_memory()


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


def _thin(tape: Tape) -> Tape:
    """Without the block outputs: to make logits of the head's input only their shapes are used."""
    outputs = tree_map(
        lambda leaf: mx.zeros_like(leaf) if isinstance(leaf, mx.array) else leaf, tape.outputs
    )
    return replace(tape, outputs=outputs)
