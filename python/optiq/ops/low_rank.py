"""The low-rank terms of many adapters beside one linear layer, each row of a batch with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp
from types import ModuleType

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from . import metal, native
from .contest import Sample

OP = "gathered_low_rank"
GPU_ROWS = 16  # more are left to stock MLX: our kernel reads the term of a row for that row alone
RANKS = 8  # ranks are padded with zeros to a multiple of this
# Exponents of the largest number of a matrix that float16 holds well.
LEAST, MOST = -6, 14

Matrix = NDArray[np.float32]
Pair = tuple[mx.array, mx.array]  # [in, rank] and [rank, out], as mlx-lm writes them


def halves(matrices: Mapping[str, tuple[Matrix, Matrix]], scale: float) -> dict[str, Pair]:
    """By path, two matrices whose product is `scale * a @ b`, as `LowRankTerms` wants them: in
    float16, with the rank padded, evaluated; all of them in one array.

    Powers of two go from one to the other until their largest numbers are about equal. Where those
    are near the ends of float16 even so, both stay float32.
    """
    padded = {path: -(-a.shape[1] // RANKS) * RANKS for path, (a, _) in matrices.items()}
    size = sum(padded[path] * (len(a) + b.shape[1]) for path, (a, b) in matrices.items())
    whole, at = np.zeros(size, np.float16), 0
    apart: dict[str, Pair] = {}
    places: dict[str, tuple[int, int, int]] = {}
    for path, (a, b) in matrices.items():
        of_a, of_b = (frexp(np.abs(m).max(initial=0))[1] for m in (a, b))
        shift, rank = (of_b + frexp(scale)[1] - of_a) // 2, padded[path]
        middle = at + len(a) * rank
        end = middle + rank * b.shape[1]
        half = LEAST <= of_a + shift <= MOST
        left, right = whole[at:middle].reshape(-1, rank), whole[middle:end].reshape(rank, -1)
        if not half:
            left, right = left.astype(np.float32), right.astype(np.float32)
        _scaled(a, 2.0**shift, left[:, : a.shape[1]])
        _scaled(b, scale * 2.0**-shift, right[: len(b)])
        if half:
            places[path] = at, middle, end
            at = end
        else:
            apart[path] = mx.array(left), mx.array(right)
    shared = mx.array(whole[:at])
    if native.extension:
        native.extension.use_large_pages(shared)
    found = {
        path: (
            shared[at:middle].reshape(-1, padded[path]),
            shared[middle:end].reshape(padded[path], -1),
        )
        for path, (at, middle, end) in places.items()
    }
    mx.eval(found)  # at once: each evaluation gives Python's lock away, and waits for it after
    return {path: found[path] if path in found else apart[path] for path in matrices}


def _scaled(matrix: Matrix, factor: float, out: NDArray[np.float16 | np.float32]) -> None:
    """`factor * matrix`, rounded into `out`."""
    if native.extension and out.dtype == np.float16:
        native.extension.to_half(np.ascontiguousarray(matrix), factor, out.view(np.uint16))
    else:
        out[...] = matrix * factor


class LowRankTerms:
    """The terms of one layer by slot: x @ a @ b each, and a gain where the layer's own product is
    multiplied with one before. Slot 0 is none."""

    def __init__(self, slots: int, width: int, out: int) -> None:
        self.width, self.out = width, out
        self._pairs: list[Pair | None] = [None] * slots
        self._gains: list[mx.array | None] = [None] * slots
        self._stacks: Pair | None = None
        self.native = native.extension and native.extension.LowRankTerms(slots, width, out)

    def put(self, slot: int, pair: Pair | None, gain: mx.array | None = None) -> None:
        """What `halves` gave, or nothing, into slot 1, 2, ..., and a gain `[out]` in float32."""
        if self.native:
            self.native.put(slot, *pair, gain) if pair else self.native.clear(slot)
        self._pairs[slot], self._gains[slot] = pair, gain
        self._stacks = None

    def __bool__(self) -> bool:
        return any(pair is not None for pair in self._pairs)

    def scaled(self, y: mx.array, slots: Sequence[int], bias: mx.array | None) -> mx.array:
        """The layer's output with the gain of each row; the bias, which is in it, has none.

        `slots` are as in `gathered_low_rank`. A row without a gain stays as it is, to the bit.
        """
        gains = [self._gains[slot] for slot in slots]
        if all(gain is None for gain in gains):
            return y
        one = mx.ones(self.out)
        more = mx.stack([one if gain is None else gain for gain in gains])[:, None] - 1
        rows = y.reshape(len(slots), -1, self.out)
        own = rows if bias is None else rows - bias
        return (rows + more * own).astype(y.dtype).reshape(y.shape)

    @property
    def stacks(self) -> Pair:
        """All terms as [slots, in, rank] and [slots, rank, out]; the ranks are padded to one."""
        if self._stacks is None:
            there = [pair for pair in self._pairs if pair is not None]
            rank, dtype = max(a.shape[1] for a, _ in there), mx.result_type(*(a for a, _ in there))
            none = mx.zeros((self.width, 0), dtype), mx.zeros((0, self.out), dtype)
            pairs = [none if p is None else p for p in self._pairs]
            self._stacks = (
                mx.stack([mx.pad(a, [(0, 0), (0, rank - a.shape[1])]) for a, _ in pairs]),
                mx.stack([mx.pad(b, [(0, rank - b.shape[0]), (0, 0)]) for _, b in pairs]),
            )
        return self._stacks


def gathered_low_rank(x: mx.array, terms: LowRankTerms, slots: Sequence[int]) -> mx.array:
    """`x[i] @ a @ b` with the term in the slot of row i; zeros where it has none.

    Args:
        x: Activations `[rows, in]`.
        terms: Of the layer.
        slots: One for each row, or for each of several runs of equally many rows.

    Returns:
        `[rows, out]` in float32. On the CPU a row does not depend on the others, to the bit.
    """
    x = x.astype(mx.float32)
    if (ext := native.active()) and terms.native:
        out: mx.array = ext.gathered_low_rank(x, terms.native, slots)
        return out
    if not terms:
        return mx.zeros((x.shape[0], terms.out))
    (a, b), rows = terms.stacks, x.shape[0]
    indices = mx.repeat(mx.array(list(slots), dtype=mx.uint32), rows // len(slots))

    def kernel(ext: ModuleType, x: mx.array) -> mx.array:
        out: mx.array = ext.gathered_low_rank(x, a, b, indices)
        return out

    def stock(x: mx.array) -> mx.array:
        down = mx.gather_mm(x[:, None, :], a.astype(mx.float32), rhs_indices=indices)
        return mx.gather_mm(down, b.astype(mx.float32), rhs_indices=indices).squeeze(-2)

    if rows > GPU_ROWS:
        return stock(x)
    launch = (a.dtype,)
    sample = Sample(f"{rows} x {terms.width} x {a.shape[2]} x {terms.out}", x.shape, (a, b))
    return metal.run(
        OP,
        launch,
        lambda ext: kernel(ext, x),
        lambda: stock(x),
        lambda: metal.refusal(OP, launch, x.dtype, kernel, stock, sample),
    )
