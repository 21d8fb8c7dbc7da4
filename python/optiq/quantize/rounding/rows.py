"""The descent where the errors of rows add up: outputs that move the model in like ways.

With x a layer's input and g the gradient at its outputs, a change D of the weight moves the model
by the mean of (g'Dx)^2, which is about (YAQA, Tseng et al. 2025, arXiv:2505.22988)

    tr(G D H D'),   G = sum g g',   H = sum mean(g^2) x x'.

The diagonal of G alone takes each row by itself. With all of it, and the others as they are, row i
costs G_ii (D_i + c_i) H (D_i + c_i)' and what does not depend on it, with c_i = sum over j != i of
G_ij D_j / G_ii: its error should undo what the others' do. That is the descent of one row, to a
target that is moved by c_i.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ... import ops

# Rows that move at a time, each as if the others stayed; far apart, since neighbours share most.
TOGETHER = 16

ROUNDS = 2  # over all rows, with one sweep over the groups of each

Floats = npt.NDArray[np.float32]


def descend_together(
    w: mx.array, start: ops.AffineWeight, inputs: mx.array, outputs: mx.array
) -> ops.AffineWeight:
    """`start`, a rounding of `w` `[out, in]`, with a smaller tr(G D H D').

    `inputs` is H `[in, in]`, `outputs` is G `[out, out]`, whose diagonal must be positive.
    """
    rows = w.shape[0]
    turns = max(1, rows // TOGETHER)
    order = np.concatenate([np.arange(turn, rows, turns) for turn in range(turns)])
    bounds = [0, *np.cumsum([len(range(turn, rows, turns)) for turn in range(turns)]).tolist()]
    weight = np.array(w.astype(mx.float32))[order]
    change = np.array(start.dequantized())[order] - weight
    h, g = np.array(inputs), np.array(outputs)[np.ix_(order, order)]
    parts = [_rows(start, mx.array(order[a:b])) for a, b in pairwise(bounds)]
    for _ in range(ROUNDS):
        for n, (a, b) in enumerate(pairwise(bounds)):
            own, old = g[a:b, a:b], change[a:b].copy()
            pull = g[a:b] @ change
            alone = (own @ old - pull) / np.diag(own)[:, None]
            # If they do share, steps of this length cannot raise what they cost together.
            careful = old - pull / np.abs(own).sum(axis=1, keepdims=True)
            for moved in (alone, careful):
                target = mx.array(weight[a:b] + moved).astype(w.dtype)
                part = ops.descend(target, parts[n], inputs, sweeps=1)
                step = np.array(part.dequantized()) - weight[a:b] - old
                if np.sum((own @ step + 2 * pull) * (step @ h)) < 0:  # what it costs in all
                    parts[n], change[a:b] = part, old + step
                    break
    arrays = zip(*(part[:3] for part in parts), strict=True)
    codes, scales, biases = (mx.concatenate(list(of)) for of in arrays)
    back = mx.array(np.argsort(order))
    return _rows(start._replace(codes=codes, scales=scales, biases=biases), back)


def _rows(weight: ops.AffineWeight, rows: mx.array) -> ops.AffineWeight:
    codes, scales, biases = (array[rows] for array in weight[:3])
    return weight._replace(codes=codes, scales=scales, biases=biases)
