"""The weights of a plan, rounded to what their layers' outputs lose.

For one layer, the model's output moves by about 1/2 sum over tokens and outputs of
(g (v - w)' x)^2, with x the layer's input and g the gradient at an output (the Fisher information,
see sensitivity/fisher.py). With one g^2 for all outputs of a token, their mean, that is
(v - w)' H (v - w) for every row w, and

    H = sum over tokens of mean(g^2) x x'

says what each row must keep (GuidedQuant, Kim et al. 2025, weighs tokens so, per group of rows).
A row e that is looked up moves the output by 1/2 (g'e)^2 each time, so an embedding's H is the sum
of g g'; one that is also the head has the sum of both, for a word that is looked up often is about
as often likely to come next.
`ops.descend` makes a rounding good by that measure, and `rows.py` by one in which the errors of
different rows add up, with G, the sum of g g' over tokens. H and G of few tokens are mostly noise
off their diagonals, which a descent would fit; so they are shrunk towards them, by what the
sequences differ in (`Moments.shrunk`). Then every module's candidates are judged by the H and G of
sequences that none was fitted to, and the best of min/max, the search and both descents is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import ops
from ...base.progress import Progress
from ...calibration import Calibration
from ...formats import DENSE, NVFP4, Format
from ...models.kinds import Kind, kind_of
from ...models.places import place_at
from ...models.roles import Module, Role, is_head, quantizable
from ...models.shapes import embedding_shape
from ...nn.accelerate import accelerate
from ...nn.replay import Replay, Tape
from ...ops import metal
from ...planning.plan import Plan
from ...sources import Source, load
from ..replay.backward import Backward, survey
from ..replay.gradients import Call
from ..replay.logits import LOGITS_BYTES
from ..replay.streamed import Drop, keep
from .reference import in_passes, open_reference
from .rows import descend_together
from .weights import MINMAX, Rounded, Rounding

# One sequence in so many judges what was fitted to the others.
JUDGE_EVERY = 8

# Added to the diagonal of H, as a share of its mean: directions that the tokens do not show.
DAMPING = 0.01

# Elements of H, or of a weight's change, that are worked on at a time beside the whole.
ELEMENTS = 1 << 24

# Bytes of recorded block outputs; of a larger model fewer sequences are used.
TAPE_BYTES = 4 << 30


@dataclass(frozen=True)
class Moments:
    """H or G, square in float32, of the sequences that are fitted to and of those that judge.

    `noise` is the standard error of the entries of `fit` off its diagonal, by what sequences differ
    in, over their own size: both as root mean squares of correlations, so that large columns do not
    count more. Of a weight for each head there is one of each: `[heads, in, in]` and `[heads]`.
    """

    fit: mx.array
    judge: mx.array
    noise: mx.array

    @property
    def shrunk(self) -> mx.array:
        """What a weight is fitted to: `fit` with that share taken off all but its diagonal."""
        diagonal = mx.diag(self.fit)
        own = self.noise * diagonal + DAMPING * mx.mean(diagonal)
        return (1 - self.noise) * self.fit + mx.diag(own)


@metal.restarts
def descend(
    source: Source,
    plan: Plan,
    text: Calibration,
    rounding: Rounding,
    *,
    reference: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Rounding:
    """`rounding` with the modules of `plan` fitted to the sequences of `text`.

    Experts and modules in nvfp4 stay as they were, and all where there are fewer than two
    sequences, or no gradients. `reference` is that of the scores.
    """
    loaded = load(source)
    model, modules = loaded.model, quantizable(loaded.model)
    work = {
        p.module.path: p
        for p in plan.modules
        if p.format not in (DENSE, NVFP4)
        and kind_of(place_at(model, p.module.path).get()) is not Kind.EXPERTS
    }
    accelerate(model, blocks=False, exact=False)
    running = open_reference(in_passes(reference), source, model, modules, MINMAX)
    fitted: dict[tuple[str, Format], Rounded] = {}
    with (
        Replay(model, modules) as replay,
        Progress(len(work), "fitting weights", enabled=progress) as bar,
    ):
        sequences = _fitting([s.tokens for s in text.sequences], model, modules)
        _, reason = survey(replay, sequences[0], [p.module for p in work.values()])
        if reason:
            bar.say(f"nothing is fitted: {reason}")
        if reason or len(sequences) < 2:
            return rounding
        tapes = replay.record_together(sequences, after=running.drop)
        running.begin()
        for module, inputs, outputs in _moments(
            replay, tapes, [m for m in modules if m.path in work], seed, running.drop
        ):
            path, fmt = module.path, work[module.path].format
            weight = running.dense(path).weight.astype(loaded.dtype)
            _, fitted[path, fmt] = (
                best_of_each(weight, fmt, inputs)
                if weight.ndim == 3
                else best(weight, fmt, inputs, outputs)
            )
            mx.eval(fitted[path, fmt])
            bar.step(note=path)
    return replace(rounding, method="descent", fitted=fitted) if fitted else rounding


def best(
    w: mx.array, fmt: Format, inputs: Moments, outputs: Moments | None = None
) -> tuple[str, Rounded]:
    """The rounding of `w` `[out, in]` whose output error is least where it is judged, and its name.

    The output error of `v` is `tr(G (v - w) H (v - w)')`; without `outputs` G is the identity.
    """
    searched = ops.quantize(w, fmt, mx.diag(inputs.fit))
    start = ops.AffineWeight(*searched, fmt.group_size, fmt.bits)
    alone = inputs.shrunk
    candidates = {
        "descent": ops.descend(w, start, alone),
        "search": start,
        "minmax": ops.AffineWeight(*ops.quantize(w, fmt), fmt.group_size, fmt.bits),
    }
    if outputs is not None and mx.all(mx.diag(both := outputs.shrunk) > 0):
        candidates["together"] = descend_together(w, candidates["descent"], alone, both)
    judge = None if outputs is None else outputs.judge
    errors = {name: _error(w, v, inputs.judge, judge) for name, v in candidates.items()}
    name = min(errors, key=lambda name: errors[name])
    return name, candidates[name][:3]


def best_of_each(w: mx.array, fmt: Format, moments: Moments) -> tuple[str, Rounded]:
    """`best` of each of `w` `[heads, out, in]`, and the way that most of them take."""
    each = zip(w, moments.fit, moments.judge, moments.noise, strict=True)
    found = [best(one, fmt, Moments(*of)) for one, *of in each]
    ways, rounded = zip(*found, strict=True)
    codes, scales, biases = (mx.stack(list(parts)) for parts in zip(*rounded, strict=True))
    return Counter(ways).most_common(1)[0][0], (codes, scales, biases)


def _error(
    w: mx.array, v: ops.AffineWeight, inputs: mx.array, outputs: mx.array | None = None
) -> float:
    if outputs is not None:
        change = v.dequantized() - w.astype(mx.float32)
        return float(np.asarray(mx.sum((change @ inputs) * (outputs @ change))))
    step, total = max(1, ELEMENTS // w.shape[-1]), 0.0
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        part = v._replace(codes=v.codes[rows], scales=v.scales[rows], biases=v.biases[rows])
        change = part.dequantized() - w[rows].astype(mx.float32)
        total += float(np.asarray(mx.sum((change @ inputs) * change)))
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


def _moments(
    replay: Replay,
    tapes: Sequence[Tape],
    modules: Sequence[Module],
    seed: int,
    after: Drop = keep,
) -> Iterator[tuple[Module, Moments, Moments | None]]:
    """The moments of each module's inputs and of the gradients at its outputs.

    Modules that are never called are left out. Rows are taken by themselves, without gradients, in
    gate and up, in embeddings and in weights for each head of attention.
    """
    every = min(JUDGE_EVERY, len(tapes))
    judges = [t % every == every - 1 for t in range(len(tapes))]
    keys = list(mx.random.split(mx.random.key(seed), len(tapes)))
    layers = [m for m in modules if m.role is not Role.HEAD]
    for module, calls in Backward(replay, tapes, keys, after).calls(layers):
        if all(calls):
            of_heads = kind_of(replay.place(module.path).get()) is Kind.HEADS
            # The gradient is to a row that is looked up what the input is to others.
            row = _gradients if module.role is Role.EMBEDDING else _of_heads if of_heads else _call
            rows = [[row(call) for call in of] for of in calls]
            if is_head(module):
                rows = [of + _head_rows(replay, tape) for of, tape in zip(rows, tapes, strict=True)]
            outputs = None
            if row is _call and not widens(module):
                outputs = _sum(judges, [[_gradients(call) for call in of] for of in calls])
            yield module, _sum(judges, rows), outputs
    for module in modules:
        if module.role is Role.HEAD:
            yield module, _sum(judges, [_head_rows(replay, tape) for tape in tapes]), None


def widens(module: Module) -> bool:
    """Whether it is a gate or up projection, whose rows gain little together and take longest."""
    out, columns = module.shape[-2:]
    return module.role is Role.MLP and out > columns


Rows = tuple[mx.array, mx.array]  # inputs [..., n, in] and how much each counts [..., n]


def _call(call: Call) -> Rows:
    (x, *_), _, gradient = call
    weights = mx.mean(mx.square(gradient.astype(mx.float32)), axis=-1)
    return x.reshape(-1, x.shape[-1]).astype(mx.float32), weights.flatten()


def _of_heads(call: Call) -> Rows:
    """Rows of each head. Run backwards, the gradient is to a row what else the input is."""
    (x, *transpose), named, gradient = call
    forwards = named.get("transpose", all(transpose))
    inputs, outputs = (x, gradient) if forwards else (gradient, x)
    weights = mx.mean(mx.square(outputs.astype(mx.float32)), axis=-1)
    shape = gradient.shape[:-1]  # [batch, heads, n]
    rows = mx.broadcast_to(inputs.astype(mx.float32), (*shape, inputs.shape[-1]))
    by_head = rows.swapaxes(0, 1).flatten(1, 2)
    return by_head, mx.broadcast_to(weights, shape).swapaxes(0, 1).flatten(1)


def _gradients(call: Call) -> Rows:
    gradient = call[2]
    rows = gradient.reshape(-1, gradient.shape[-1]).astype(mx.float32)
    return rows, mx.ones(rows.shape[0])


def _head_rows(replay: Replay, tape: Tape) -> list[Rows]:
    """Of the head, sum over words of E g^2 = 1 - sum p^2, with g = [word is the label] - p."""
    rows = []
    for chunk in tape.chunks(LOGITS_BYTES):
        x = tape.hidden[0, chunk]
        p = mx.softmax(replay.logits(tape, x).astype(mx.float32), axis=-1)
        weights = 1 - mx.sum(mx.square(p), axis=-1)
        mx.eval(weights)
        rows.append((x.astype(mx.float32), weights))
    return rows


def _sum(judges: Sequence[bool], rows: Sequence[Sequence[Rows]]) -> Moments:
    *heads, _, size = rows[0][0][0].shape
    diagonal = mx.zeros((*heads, size))
    for x, weights in chain.from_iterable(rows):
        diagonal = diagonal + mx.sum(mx.square(x) * weights[..., None], axis=-2)
    sums = [mx.zeros((*heads, size, size)) for _ in range(2)]
    each = mx.zeros(heads)
    for judge, of in zip(judges, rows, strict=True):
        hessian = mx.zeros((*heads, size, size))
        for x, weights in of:
            hessian = hessian + (x * weights[..., None]).swapaxes(-1, -2) @ x
            mx.eval(hessian)
        sums[judge] = sums[judge] + hessian
        each = each + _off_diagonal(hessian, diagonal)
        mx.eval(sums, each)
    fit, judging = sums
    n, fitted = len(judges), judges.count(False)
    variance = (each - _off_diagonal(fit + judging, diagonal) / n) / (n - 1)  # of one sequence
    observed = _off_diagonal(fit, diagonal)
    share = mx.clip(fitted * variance / mx.where(observed > 0, observed, mx.inf), 0, 1)
    return Moments(fit, judging, mx.sqrt(share))


def _off_diagonal(hessian: mx.array, diagonal: mx.array) -> mx.array:
    """The sum of squares off the diagonal, columns and rows divided by the root of `diagonal`."""
    scale = mx.where(diagonal > 0, mx.rsqrt(diagonal), 0)
    size = hessian.shape[-1]
    step, total = max(1, ELEMENTS // size), mx.zeros(hessian.shape[:-2])
    for start in range(0, size, step):
        rows = slice(start, start + step)
        scaled = hessian[..., rows, :] * scale[..., rows, None] * scale[..., None, :]
        scaled = scaled * (1 - mx.eye(scaled.shape[-2], size, start))
        total = total + mx.sum(mx.square(scaled), axis=(-2, -1))
        mx.eval(total)
    return total
