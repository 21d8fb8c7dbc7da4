"""The low-rank terms of many adapters beside one linear layer, each row of a batch with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp

import mlx.core as mx
import numpy as np

from . import native

RANKS = 8  # ranks are padded with zeros to a multiple of this
# Exponents of the largest number of a matrix that float16 holds well.
LEAST, MOST = -6, 14

Pair = tuple[mx.array, mx.array]  # [in, rank] and [rank, out], as mlx-lm writes them


def halves(pairs: Mapping[str, Pair], scale: float) -> dict[str, Pair]:
    """By path, two matrices whose product is `scale * a @ b`, as `LowRankTerms` wants them: in
    float16, with the rank padded, evaluated; all of them in one array.

    Powers of two go from one to the other until their largest numbers are about equal. Where those
    are near the ends of float16 even so, both stay float32.
    """
    # Few large evaluations: each gives Python's lock away, and has to wait for it after.
    largest = mx.stack(
        [mx.abs(m).max().astype(mx.float32) for pair in pairs.values() for m in pair]
    )
    exponents = [frexp(float(x))[1] for x in np.asarray(largest)]
    found, flat = {}, []
    for path, (a, b), of_a, of_b in zip(
        pairs, pairs.values(), exponents[::2], exponents[1::2], strict=True
    ):
        shift = (of_b + frexp(scale)[1] - of_a) // 2
        half = mx.float16 if LEAST <= of_a + shift <= MOST else mx.float32
        wider = -a.shape[1] % RANKS
        left = mx.pad((a.astype(mx.float32) * 2.0**shift).astype(half), [(0, 0), (0, wider)])
        right = b.astype(mx.float32) * (scale * 2.0**-shift)
        right = mx.pad(right.astype(half), [(0, wider), (0, 0)])
        if half == mx.float16:
            flat += [left.flatten(), right.flatten()]
        found[path] = left, right
    whole = mx.concatenate(flat) if flat else mx.zeros(0)
    apart = [pair for pair in found.values() if pair[0].dtype == mx.float32]
    mx.eval(whole, apart)
    if native.extension:
        native.extension.use_large_pages(whole)
    at = 0
    for path, (left, right) in found.items():
        if left.dtype == mx.float16:
            middle, end = at + left.size, at + left.size + right.size
            found[path] = (
                whole[at:middle].reshape(left.shape),
                whole[middle:end].reshape(right.shape),
            )
            at = end
    mx.eval(found)
    return found


class LowRankTerms:
    """The terms of one layer by slot: x @ a @ b each. Slot 0 is none."""

    def __init__(self, slots: int, width: int, out: int) -> None:
        self.width, self.out = width, out
        self._pairs: list[Pair | None] = [None] * slots
        self._stacks: Pair | None = None
        self.native = native.extension and native.extension.LowRankTerms(slots, width, out)

    def put(self, slot: int, pair: Pair | None) -> None:
        """What `halves` gave, or nothing, into slot 1, 2, ..."""
        if self.native:
            self.native.put(slot, *pair) if pair else self.native.clear(slot)
        self._pairs[slot] = pair
        self._stacks = None

    def __bool__(self) -> bool:
        return any(pair is not None for pair in self._pairs)

    @property
    def stacks(self) -> Pair:
        """All terms as [slots, in, rank] and [slots, rank, out]; the ranks are padded to one."""
        if self._stacks is None:
            rank = max(p[0].shape[1] for p in self._pairs if p is not None)
            none = mx.zeros((self.width, 0)), mx.zeros((0, self.out))
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
    a, b = (m.astype(mx.float32) for m in terms.stacks)
    indices = mx.repeat(mx.array(list(slots), dtype=mx.uint32), x.shape[0] // len(slots))
    down = mx.gather_mm(x[:, None, :], a, rhs_indices=indices)
    return mx.gather_mm(down, b, rhs_indices=indices).squeeze(-2)
