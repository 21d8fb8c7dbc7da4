"""The weights of a plan, rounded to what their layers' outputs lose.

For one layer, the model's output moves by about 1/2 sum over tokens and outputs of
(g (v - w)' x)^2, with x the layer's input and g the gradient at an output (the Fisher information,
see sensitivity/fisher.py). With one g^2 for all outputs of a token, their mean, that is
(v - w)' H (v - w) for every row w, where H is the sum of mean(g^2) x x' (GuidedQuant, Kim et al.
2025, weighs tokens so, per group of rows). But of a value projection's 8,192 tokens the gradients
of some twenty can be nearly all of that sum, and it says little about other text. So tokens count
less unevenly:

    H = sum over tokens of mean(g^2)^(1/2) x x'

says what each row must keep.
A row e that is looked up moves the output by 1/2 (g'e)^2 each time, so an embedding's H is the sum
of g g'; one that is also the head has the sum of both, for a word that is looked up often is about
as often likely to come next.
`ops.descend` makes a rounding good by that measure, and then, unless it must be quick, by one in
which the errors of different rows add up, with G, the sum of g g' over tokens. Both are shrunk
first (moments.py). Then every module's candidates are judged by the H and G of sequences that none
was fitted to, and the best of the search and both descents is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import ops
from ...base.memory import give_back
from ...base.progress import Progress
from ...calibration import Calibration
from ...distributed.ranks import ALONE, World
from ...formats import DENSE, NVFP4, Format
from ...models.roles import Module, quantizable
from ...models.shapes import embedding_shape
from ...nn.accelerate import accelerate
from ...nn.replay import Replay
from ...ops import metal
from ...planning.plan import Plan, Planned
from ...sources import Source, load
from ..replay.backward import survey
from ..replay.shared import Shared
from .fitted import InFiles, InMemory
from .moments import ELEMENTS, FewMoments, InputMoments, Moments, divided, moments
from .reference import in_passes, open_reference
from .weights import MINMAX, Rounded, Rounding

# Over a layer, over one that few rows are kept of, and over all rows where their errors add up.
SWEEPS, FEW_SWEEPS, TOGETHER_SWEEPS = 4, 2, 2

# Bytes of recorded block outputs; of a larger model fewer sequences are used.
TAPE_BYTES = 4 << 30

# Of an embedding or a head that are rounded together.
ROWS = 8192


@metal.restarts
def descend(
    source: Source,
    plan: Plan,
    text: Calibration,
    rounding: Rounding,
    *,
    reference: str = "auto",
    together: bool = True,
    folder: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    world: World = ALONE,
) -> Rounding:
    """`rounding` with the modules of `plan` fitted to the sequences of `text`.

    With `folder` they are kept in files there, and not in memory. `together` says whether the
    errors of rows add up.

    Modules in nvfp4 stay as they were, and all where there are fewer than two sequences, or no
    gradients. `reference` is that of the scores. The ranks of `world` divide sequences and modules,
    and each returns the same.
    """
    loaded = load(source)
    model, modules = loaded.model, quantizable(loaded.model)
    work = {p.module.path: p for p in plan.modules if p.format not in (DENSE, NVFP4)}
    accelerate(model, blocks=False, exact=False)
    running = open_reference(in_passes(reference), source, model, modules, MINMAX)
    store = InFiles(folder) if folder else InMemory()
    with (
        world.in_step(),
        Replay(model, modules) as replay,
        Progress(len(work), "fitting weights", enabled=progress) as bar,
    ):
        sequences = _fitting([s.tokens for s in text.sequences], model, modules)
        _, reason = survey(replay, sequences[0], [p.module for p in work.values()])
        if reason:
            bar.say(f"nothing is fitted: {reason}")
        if reason or len(sequences) < 2:
            return rounding
        shared = Shared.record(world, replay, sequences, running.drop)
        running.begin()
        for module, inputs, outputs in moments(
            replay, shared, [m for m in modules if m.path in work], seed, running.drop, together
        ):
            give_back()
            path, fmt = module.path, work[module.path].format
            if inputs is not None:
                weight = running.dense(path).weight.astype(loaded.dtype)
                if not isinstance(inputs, Moments | FewMoments):
                    ranks = world if divided(module) else ALONE
                    _, found = best_of_each(weight, fmt, inputs, ranks)
                elif divided(module) and outputs is None:
                    found = best_of_rows(weight, fmt, inputs, world)
                else:
                    _, found = best(weight, fmt, inputs, outputs)
                mx.eval(found)
                store.add((path, fmt), found)
                del found, inputs, outputs  # before those of the next one are made
                give_back()
            bar.step(note=path)
        if world.size > 1:
            _share(store, work.values(), world)
    return replace(rounding, method="descent", fitted=store) if store else rounding


def _share(store: InFiles | InMemory, work: Iterable[Planned], world: World) -> None:
    """Take over what the other ranks have fitted, one module after the other."""
    for planned in work:
        key = planned.module.path, planned.format
        parts = world.gather(store.get(key))
        if key not in store:
            for codes, scales, biases in filter(None, parts):
                store.add(key, (codes, scales, biases))


def best(
    w: mx.array, fmt: Format, inputs: InputMoments, outputs: Moments | None = None
) -> tuple[str, Rounded]:
    """The rounding of `w` `[out, in]` whose output error is least where it is judged, and its name.

    The output error of `v` is `tr(G (v - w) H (v - w)')`; without `outputs` G is the identity.
    """
    found = _candidates(w, fmt, inputs, outputs)
    errors = {name: _error(w, v, inputs, outputs) for name, v in found.items()}
    name = min(errors, key=lambda name: errors[name])
    return name, found[name][:3]


def best_of_rows(w: mx.array, fmt: Format, inputs: InputMoments, world: World = ALONE) -> Rounded:
    """`best` of some rows of a long `w` at a time, which the ranks divide."""
    starts = range(0, w.shape[0], ROWS)
    own = range(len(starts))[world.rank :: world.size]
    found = {n: best(w[starts[n] : starts[n] + ROWS], fmt, inputs)[1] for n in own}
    return _joined(world.join(found), mx.concatenate)


def best_of_each(
    w: mx.array, fmt: Format, moments: Iterable[Moments], world: World = ALONE
) -> tuple[str, Rounded]:
    """`best` of `w` `[experts or heads, out, in]`: what is best for all of them in sum.

    Few tokens judge an expert, too few to choose for it alone. `moments` are those of the experts
    that are this rank's, every size-th.
    """
    own = range(w.shape[0])[world.rank :: world.size]
    errors: dict[int, dict[str, float]] = {}
    found: dict[int, dict[str, Rounded]] = {}
    for n, of in zip(own, moments, strict=True):
        candidates = _candidates(w[n], fmt, of)
        errors[n] = {name: _error(w[n], v, of) for name, v in candidates.items()}
        found[n] = {name: v[:3] for name, v in candidates.items()}
    total: dict[str, float] = defaultdict(float)
    for each in world.join(errors):
        for name, error in each.items():
            total[name] += error
    name = min(total, key=lambda name: total[name])
    return name, _joined(world.join({n: found[n][name] for n in own}), mx.stack)


def _joined(parts: Sequence[Rounded], join: Callable[[list[mx.array]], mx.array]) -> Rounded:
    codes, scales, biases = (join(list(of)) for of in zip(*parts, strict=True))
    return codes, scales, biases


def _candidates(
    w: mx.array, fmt: Format, inputs: InputMoments, outputs: Moments | None = None
) -> dict[str, ops.AffineWeight]:
    searched = ops.quantize(w, fmt, inputs.diagonal)
    start = ops.AffineWeight(*searched, fmt.group_size, fmt.bits)
    alone = inputs.shrunk
    sweeps = FEW_SWEEPS if isinstance(inputs, FewMoments) else SWEEPS
    found = {
        "descent": ops.descend(w, start, alone, sweeps=sweeps),
        "search": start,
    }
    if outputs is not None and mx.all(mx.diag(both := outputs.shrunk) > 0):
        found["together"] = ops.descend(
            w, found["descent"], alone, outputs=both, sweeps=TOGETHER_SWEEPS
        )
    return found


def _error(
    w: mx.array, v: ops.AffineWeight, inputs: InputMoments, outputs: Moments | None = None
) -> float:
    if outputs is not None:
        change = v.dequantized() - w.astype(mx.float32)
        return float(np.asarray(inputs.judged(change, outputs)))
    step, total = max(1, ELEMENTS // w.shape[-1]), 0.0
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        part = v._replace(codes=v.codes[rows], scales=v.scales[rows], biases=v.biases[rows])
        change = part.dequantized() - w[rows].astype(mx.float32)
        total += float(np.asarray(inputs.judged(change)))
    return total


def _fitting(
    sequences: Sequence[Sequence[int]], model: nn.Module, modules: Sequence[Module]
) -> list[Sequence[int]]:
    """As many sequences as TAPE_BYTES hold the runs of, and two at least."""
    _, width = embedding_shape(modules)
    room = TAPE_BYTES // (4 * width * len(model.layers))  # in tokens
    ends = accumulate(map(len, sequences))
    return [
        s for i, (s, end) in enumerate(zip(sequences, ends, strict=True)) if end <= room or i < 2
    ]
