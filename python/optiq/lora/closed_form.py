"""Low-rank terms in closed form: the best repair of a quantized layer, a weight's largest part.

QERA (Zhang et al. 2024): of all terms of rank r, the one that leaves the least error at the output,
E |(D - B A) x|^2 with D = W - Q, comes from the singular vectors of D L, where L L' = E[x x'].
With the left ones U_r it is B A = U_r U_r' D. PiSSA (Meng et al. 2024) takes the largest part of
the weight itself. No model here: matrices in, matrices out.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .layers import LowRank
from .moments import FloatArray

RANDOM = 3**-0.5  # size of a column of `in` uniform numbers within in^-0.5 (start.zero), on average
RIDGE = 1e-6  # of the mean second moment: columns that nothing drives are still defined


class Repair(NamedTuple):
    """`energies`: the output error that each rank repairs, falling; `left` singular vectors."""

    energies: FloatArray
    left: FloatArray  # U, [out, ranks]
    right: FloatArray  # U' D, [ranks, in]
    typical: float  # root mean square of x times a column that begins at random

    def term(self, rank: int, scale: float) -> LowRank:
        """What each column of `a` makes of x is as large as with a random beginning (init zero).
        Good rounding leaves errors where activations are small, and training learns less where
        both halves are equally large."""
        tiny = np.finfo(np.float64).tiny
        share = self.typical / np.sqrt(np.maximum(self.energies[:rank], tiny))
        return split(self.left[:, :rank], self.right[:rank], share, scale)


def repair(error: FloatArray, moment: FloatArray, most: int) -> Repair:
    """The first `most` ranks that repair the error D [out, in] of a layer.

    `moment` is E[x x'], or its diagonal.
    """
    mean = float(moment.mean() if moment.ndim == 1 else np.trace(moment) / len(moment))
    if moment.ndim == 1:
        driven = error * np.sqrt(moment + RIDGE * mean)
    else:
        driven = error @ _root(moment, RIDGE * mean)
    energies, left = left_vectors(driven, most)
    return Repair(energies, left, left.T @ error, RANDOM * mean**0.5)


def _root(moment: FloatArray, ridge: float) -> FloatArray:
    """L with L L' = the moment and the ridge."""
    try:
        return np.asarray(np.linalg.cholesky(moment + ridge * np.eye(len(moment))), np.float64)
    except np.linalg.LinAlgError:  # sums in float32 were off by more than the ridge
        values, vectors = np.linalg.eigh(moment)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0) + ridge), np.float64)


def left_vectors(matrix: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """Squared singular values, falling, and left singular vectors [rows, most]."""
    rows, columns = matrix.shape
    most = min(most, rows, columns)
    if rows <= columns:
        values, vectors = np.linalg.eigh(matrix @ matrix.T)
        left = vectors[:, ::-1][:, :most]
    else:
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        left = np.linalg.qr(matrix @ vectors[:, ::-1][:, :most])[0]
    return np.maximum(values[::-1], 0.0), left


def principal(weight: FloatArray, rank: int, scale: float) -> LowRank:
    """The largest part of rank `rank` of a weight [out, in]."""
    _, left = left_vectors(weight, rank)
    return balanced(left, left.T @ weight, scale)


def balanced(b: FloatArray, a: FloatArray, scale: float) -> LowRank:
    """scale * x @ term.a @ term.b = x @ (b a)', with both halves of a rank equally large."""
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0)
    tiny = np.finfo(np.float64).tiny
    share = np.sqrt(np.maximum(size_b, tiny) / np.maximum(size_a, tiny))
    return split(b, a, share / np.sqrt(scale), scale)


def split(b: FloatArray, a: FloatArray, share: FloatArray, scale: float) -> LowRank:
    """The same term, with each row of `a` times its `share`."""
    return LowRank(
        mx.array((a.T * share).astype(np.float32)),
        mx.array((b / share / scale).T.astype(np.float32)),
    )
