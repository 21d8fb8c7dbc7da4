"""H and G: how the columns, and the rows, of a layer's weight move the model together.

They are sums over tokens of x x', with x the layer's input weighted by the gradient at its output,
and of g g', with that gradient (see descent.py). Of few tokens they are mostly noise off their
diagonals, which a descent would fit; so they are shrunk, by what the sequences differ in.

Of fewer rows than columns the rows are kept in place of H, which is then never made: for the down
projection of a model of 8 billion weights and 1,024 tokens 59 MB in place of 822. Those that judge
are mostly so few.

An expert sees a few of the tokens. Its columns are driven together much as those of the others are,
for all have the same inputs; so its H is shrunk towards the layer's, the sum over all experts,
which is shrunk itself. Only how strongly each column is driven is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ... import ops
from ...models.kinds import Kind, kind_of
from ...models.roles import Module, Role, is_head
from ...nn.layers import expert_rows
from ...nn.replay import Replay, Tape
from ..replay.backward import Backward
from ..replay.gradients import Call
from ..replay.logits import LOGITS_BYTES
from ..replay.shared import Shared
from ..replay.streamed import Drop, keep
from .importance import PRIOR_ROWS

# One sequence in so many judges what was fitted to the others.
JUDGE_EVERY = 8

# Added to the diagonal of H, as a share of its mean: directions that the tokens do not show.
DAMPING = 0.01

# What a weight takes for each column, in multiplications of a product on one core.
_DESCENT, _TOGETHER = 6, 10

# Elements of H, or of a weight's change, that are worked on at a time beside the whole.
ELEMENTS = 1 << 24

# Of rows and columns, of which a part of H is made at a time.
PART = 2048


def few(rows: float, columns: int) -> bool:
    """Whether so many rows are kept in place of their H."""
    return 2 * rows < columns


def made(columns: int) -> int:
    """The elements of H that are made; the others are the same."""
    full, rest = divmod(columns, PART)
    return PART**2 * full * (full + 1) // 2 + rest * columns


class Judging:
    """Moments that judge a change of a weight: by H, or by rows where they are few."""

    judge: mx.array

    def judged(self, change: mx.array, outputs: Moments | None = None) -> mx.array:
        """The output error tr(G change H change') where it is judged."""
        moved = change @ self.judge.T
        other = moved if few(*self.judge.shape) else change
        if outputs is not None:
            rows = outputs.judge
            other = rows.T @ (rows @ other) if few(*rows.shape) else rows @ other
        return mx.sum(moved * other)


@dataclass(frozen=True)
class Moments(Judging):
    """H or G, square in float32, of the sequences that are fitted to and of those that judge.

    Where few rows judge, `judge` are these, by the root of how much they count.

    `noise` is the standard error of the entries of `fit` off its diagonal, by what sequences differ
    in, over their distance from the target: both as root mean squares of correlations, so that
    large columns do not count more. The target has the diagonal of `fit`, and these `correlations`;
    without them it has nothing else.
    """

    fit: mx.array
    judge: mx.array
    noise: mx.array
    correlations: mx.array | None = None

    @property
    def diagonal(self) -> mx.array:
        """That of what is fitted to."""
        return mx.diag(self.fit)

    @property
    def shrunk(self) -> mx.array:
        """What a weight is fitted to: `fit` moved by the share `noise` towards the target."""
        diagonal = self.diagonal
        added = mx.full(diagonal.shape, DAMPING * mx.mean(diagonal))
        shrunk = (1 - self.noise) * self.fit
        if self.correlations is None:
            added += self.noise * diagonal
        else:
            shrunk += self.noise * _with_diagonal(diagonal, self.correlations)
        return shrunk + mx.diag(added)


@dataclass(frozen=True)
class FewMoments(Judging):
    """The same of few rows: `fit` and `judge` are the rows, by the root of how much they count."""

    fit: mx.array
    judge: mx.array
    noise: mx.array

    @property
    def diagonal(self) -> mx.array:
        return mx.sum(mx.square(self.fit), axis=0)

    @property
    def shrunk(self) -> ops.Sampled:
        diagonal = self.diagonal
        added = self.noise * diagonal + DAMPING * mx.mean(diagonal)
        return ops.Sampled(mx.sqrt(1 - self.noise) * self.fit, added)


InputMoments = Moments | FewMoments


def _with_diagonal(diagonal: mx.array, correlations: mx.array) -> mx.array:
    root = mx.sqrt(diagonal)
    return correlations * root[:, None] * root


Rows = tuple[mx.array, mx.array]  # inputs [n, in] and how much each counts [n]
Numbers = npt.NDArray[np.uint32]


def moments(
    replay: Replay,
    shared: Shared,
    modules: Sequence[Module],
    seed: int,
    after: Drop = keep,
    together: bool = True,
) -> Iterator[tuple[Module, InputMoments | Iterator[Moments] | None, Moments | None]]:
    """The moments of each module's inputs, and with `together` of the gradients at its outputs;
    None where another rank works on the module.

    Of experts, and of weights for each head of attention, there are moments for each, to be taken
    before the next module. Modules that are never called are left out. Rows are taken by
    themselves, without gradients, in these, in gate and up, and in embeddings.
    """
    count = shared.count
    every = min(JUDGE_EVERY, count)
    judges = [t % every == every - 1 for t in range(count)]
    keys = list(mx.random.split(mx.random.key(seed), count))
    layers = [m for m in modules if m.role is not Role.HEAD]
    backward = Backward(replay, shared.tapes, [keys[t] for t in shared.own], after)
    cost = partial(_cost, shared.tokens, together)
    for module, calls in shared.calls(backward, layers, cost, divided):
        if calls is None:
            yield module, None, None
        elif all(calls):
            kind = kind_of(replay.place(module.path).get())
            if kind is Kind.EXPERTS:
                own = range(module.shape[0])[shared.world.rank :: shared.world.size]
                yield module, _of_experts(judges, calls, own), None
                continue
            if kind is Kind.HEADS:
                yield module, _of_heads(judges, calls, module.shape[0]), None
                continue
            # The gradient is to a row that is looked up what the input is to others.
            row = _gradients if module.role is Role.EMBEDDING else _inputs
            rows = [[row(call) for call in of] for of in calls]
            if is_head(module):
                rows = [
                    of + more for of, more in zip(rows, _all_head_rows(replay, shared), strict=True)
                ]
            if paired(module, together):
                outputs = _sum(judges, [[_gradients(call) for call in of] for of in calls])
                yield module, _sum(judges, rows), outputs
            else:
                yield module, _of_rows(judges, rows), None
    after(None)  # an embedding is as large as a head
    for module in modules:
        if module.role is Role.HEAD:
            yield module, _of_rows(judges, _all_head_rows(replay, shared)), None


def divided(module: Module) -> bool:
    """Whether all ranks work on the module, each on rows or experts of its own."""
    return module.block is None or module.role is Role.EXPERT


def paired(module: Module, together: bool) -> bool:
    """Whether the module's rows are fitted together, if rows are at all."""
    plain = len(module.shape) == 2 and module.role not in (Role.EMBEDDING, Role.HEAD)
    return together and plain and not widens(module)


def sampled(module: Module, tokens: int, together: bool) -> bool:
    """Whether a module that is `paired` or not keeps the rows of so many tokens in place of H."""
    return not together and len(module.shape) == 2 and few(tokens, module.shape[-1])


def _cost(tokens: int, together: bool, module: Module) -> float:
    """What the moments and the descents of a module take, in multiplications of a product."""
    out, width = module.shape[-2:]
    together = paired(module, together)
    if sampled(module, tokens, together):
        return prod(module.shape) * 2 * tokens * _DESCENT
    return 2 * tokens * (made(width) + together * made(out)) + prod(module.shape) * width * (
        _DESCENT + together * _TOGETHER
    )


def widens(module: Module) -> bool:
    """Whether it is a gate or up projection, whose rows gain little together and take longest."""
    out, columns = module.shape[-2:]
    return module.role is Role.MLP and out > columns


def _inputs(call: Call) -> Rows:
    (x, *_), _, gradient = call
    return x.reshape(-1, x.shape[-1]).astype(mx.float32), _weights(gradient).flatten()


def _weights(gradient: mx.array) -> mx.array:
    """Of each token the root of its mean g^2: by g^2 a few tokens would be most of H."""
    return mx.sqrt(mx.mean(mx.square(gradient.astype(mx.float32)), axis=-1))


def _gradients(call: Call) -> Rows:
    gradient = call[2]
    rows = gradient.reshape(-1, gradient.shape[-1]).astype(mx.float32)
    return rows, mx.ones(rows.shape[0])


def _of_heads(
    judges: Sequence[bool], calls: Sequence[Sequence[Call]], heads: int
) -> Iterator[Moments]:
    for head in range(heads):
        yield _sum(judges, [[_of_head(call, head) for call in of] for of in calls])


def _of_head(call: Call, head: int) -> Rows:
    """Run backwards, the gradient is to a row what else the input is."""
    (x, *transpose), named, gradient = call
    x, gradient = (a[..., head if a.shape[-3] > 1 else 0, :, :] for a in (x, gradient))
    forwards = named.get("transpose", all(transpose))
    inputs, outputs = (x, gradient) if forwards else (gradient, x)
    return _inputs(((inputs,), {}, outputs))


def _of_experts(
    judges: Sequence[bool], calls: Sequence[Sequence[Call]], experts: range
) -> Iterator[Moments]:
    laid_out = [[_expert_rows(call) for call in of] for of in calls]
    layer = _sum(judges, [[rows for rows, _ in of] for of in laid_out])
    seen = sum(
        len(chosen)
        for judge, of in zip(judges, laid_out, strict=True)
        if not judge
        for _, chosen in of
    )
    prior = layer.shrunk * (PRIOR_ROWS / seen)
    mx.eval(prior)
    for expert in experts:
        yield _sum(judges, [list(_chosen(of, expert)) for of in laid_out], prior)


def _expert_rows(call: Call) -> tuple[Rows, Numbers]:
    """The rows of all experts, and the expert of each."""
    (x, indices, *_), _, gradient = call
    rows, experts, _ = expert_rows(x, indices)
    weights = _weights(gradient).flatten()
    return (rows.astype(mx.float32), weights), np.array(experts)


def _chosen(calls: Sequence[tuple[Rows, Numbers]], expert: int) -> Iterator[Rows]:
    for (x, weights), experts in calls:
        if len(at := np.flatnonzero(experts == expert)):
            yield x[mx.array(at)], weights[mx.array(at)]


def _all_head_rows(replay: Replay, shared: Shared) -> list[list[Rows]]:
    """`_head_rows` of all sequences."""
    own = {t: _head_rows(replay, tape) for t, tape in zip(shared.own, shared.tapes, strict=True)}
    return shared.world.join(own)


def _head_rows(replay: Replay, tape: Tape) -> list[Rows]:
    """Of the head, sum over words of E g^2 = 1 - sum p^2, with g = [word is the label] - p."""
    rows = []
    for chunk in tape.chunks(LOGITS_BYTES):
        x = tape.hidden[0, chunk]
        p = ops.softmax(replay.logits(tape, x))
        weights = 1 - mx.sum(mx.square(p), axis=-1)
        mx.eval(weights)
        rows.append((x.astype(mx.float32), weights))
    return rows


def _of_rows(judges: Sequence[bool], rows: Sequence[Sequence[Rows]]) -> InputMoments:
    """`_sum` without a prior, where the rows are few of them."""
    if not few(sum(len(x) for of in rows for x, _ in of), rows[0][0][0].shape[-1]):
        return _sum(judges, rows)
    scale = _inverse_root(sum(map(_diagonal, rows), mx.array(0.0)))
    each = sum((_squares(of, scale) for of in rows), mx.array(0.0))
    fit, judge = _divided(judges, rows)
    share = _share(judges, each, _squares([*fit, *judge], scale), _squares(fit, scale))
    size = len(scale)
    return FewMoments(_weighed(fit, size), _weighed(judge, size), mx.sqrt(share))


def _sum(
    judges: Sequence[bool], rows: Sequence[Sequence[Rows]], prior: mx.array | None = None
) -> Moments:
    """The moments of `rows`, by sequence; with a `prior`, an H that is added to what is fitted to
    and gives the correlations of the target.
    """
    size = (rows[0][0][0] if prior is None else prior).shape[-1]
    diagonal = mx.zeros(size) if prior is None else mx.diag(prior)
    scale = _inverse_root(sum(map(_diagonal, rows), diagonal))
    each = mx.array(0.0)
    for of in rows:
        each = each + (_squares(of, scale) if of else 0)
        mx.eval(each)
    fitted, judging = _divided(judges, rows)
    fit = _hessian(fitted, size)
    if few(sum(len(x) for x, _ in judging), size):
        judge = _weighed(judging, size)
        scaled = judge * mx.square(scale)
        both = mx.sum((scaled @ fit - scaled * mx.diag(fit)) * scaled)
        of_all = _off_diagonal(fit, scale) + 2 * both + _squares(judging, scale)
    else:
        judge = _hessian(judging, size)
        of_all = _off_diagonal(fit + judge, scale)
    if prior is None:
        correlations, distance = None, fit
    else:
        root = _inverse_root(mx.diag(prior))
        correlations = prior * root[:, None] * root
        fit = fit + prior
        distance = fit - _with_diagonal(mx.diag(fit), correlations)
    share = _share(judges, each, of_all, _off_diagonal(distance, scale))
    return Moments(fit, judge, mx.sqrt(share), correlations)


def _divided(
    judges: Sequence[bool], rows: Sequence[Sequence[Rows]]
) -> tuple[Sequence[Rows], Sequence[Rows]]:
    """The rows that are fitted to, and those that judge."""
    fitted, judging = (
        [x for own, of in zip(judges, rows, strict=True) if own == way for x in of]
        for way in (False, True)
    )
    return fitted, judging


def _hessian(rows: Sequence[Rows], size: int) -> mx.array:
    """The sum of w x x'. Parts below the diagonal are those above it."""
    cuts = [slice(at, at + PART) for at in range(0, size, PART)]
    parts = {
        (i, j): mx.zeros((len(range(size)[a]), len(range(size)[b])))
        for i, a in enumerate(cuts)
        for j, b in enumerate(cuts)
        if i <= j
    }
    for x, weights in _in_parts(rows):
        columns = [mx.contiguous(x[:, cut]) for cut in cuts]  # a product would copy each anew
        weighted = [part * weights[:, None] for part in columns]
        for i, j in parts:
            parts[i, j] = parts[i, j] + weighted[i].T @ columns[j]
        mx.eval(parts)
    return mx.concatenate(
        [
            mx.concatenate(
                [parts[i, j] if i <= j else parts[j, i].T for j in range(len(cuts))], axis=1
            )
            for i in range(len(cuts))
        ]
    )


def _in_parts(rows: Sequence[Rows]) -> Iterator[Rows]:
    """PART rows at a time, or a few more."""
    waiting: list[Rows] = []
    for n, row in enumerate(rows, 1):
        waiting.append(row)
        if n == len(rows) or sum(len(x) for x, _ in waiting) >= PART:
            parts, weights = zip(*waiting, strict=True)
            yield mx.concatenate(list(parts)), mx.concatenate(list(weights))
            waiting.clear()


def _share(
    judges: Sequence[bool], each: mx.array, of_all: mx.array, observed: mx.array
) -> mx.array:
    """The variance of what is fitted to, over its squared distance from the target.

    `each` and `of_all` are the squares of the sequences' own H and of the H of all of them.
    """
    n, fitted = len(judges), judges.count(False)
    variance = (each - of_all / n) / (n - 1)  # of one sequence
    return mx.clip(mx.where(observed > 0, fitted * variance / observed, 0), 0, 1)


def _diagonal(of: Sequence[Rows]) -> mx.array:
    return sum(
        (mx.sum(mx.square(x) * weights[:, None], axis=0) for x, weights in of), mx.array(0.0)
    )


def _weighed(of: Sequence[Rows], size: int) -> mx.array:
    """Rows `[any, size]` whose products are H."""
    none = mx.zeros((0, size))
    return mx.concatenate([none, *(x * mx.sqrt(weights)[:, None] for x, weights in of)])


def _inverse_root(x: mx.array) -> mx.array:
    return mx.where(x > 0, mx.rsqrt(x), 0)


def _squares(of: Sequence[Rows], scale: mx.array) -> mx.array:
    """The sum of squares off the diagonal of the H of these rows, columns times `scale`.

    All squares sum to those of the products of the rows with each other, which mostly are fewer.
    """
    x = _weighed(of, len(scale)) * scale
    products = x @ x.T if len(x) < len(scale) else x.T @ x
    return mx.sum(mx.square(products)) - mx.sum(mx.square(mx.sum(mx.square(x), axis=0)))


def _off_diagonal(hessian: mx.array, scale: mx.array) -> mx.array:
    """The sum of squares off the diagonal, columns and rows times `scale`."""
    h, s, total = np.asarray(hessian), np.asarray(scale), 0.0
    step = max(1, ELEMENTS // len(s))
    for start in range(0, len(s), step):
        rows = slice(start, start + step)
        scaled = h[rows] * s
        scaled *= s[rows, None]
        diagonal = np.diagonal(scaled, start)
        total += float(np.vdot(scaled, scaled)) - float(np.vdot(diagonal, diagonal))
    return mx.array(total)
