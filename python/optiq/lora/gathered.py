"""Many adapters beside one model, each row of a batch with its own.

`shadow` makes a second model of the same weights, in which every linear layer can add the term of
an adapter to each row. Terms of all adapters lie in two arrays a layer, by slot; slot 0 is none.
The first model stays as it is, so rows without an adapter are what they always were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..kv import route
from ..models.adaptable import adaptable
from ..models.places import place_at
from ..models.roles import Role
from .layers import LowRank

RANKS = 8  # ranks of all slots of a layer are padded to a multiple of this


class Selection:
    """The slot of each row of the next batch."""

    def __init__(self) -> None:
        self.set([0])

    def set(self, rows: Sequence[int]) -> None:
        self._rows = mx.array(list(rows), dtype=mx.uint32)
        self._of: dict[int, mx.array] = {}

    def of(self, tokens: int) -> mx.array:
        """The slot of each token of all rows, which are equally long."""
        if tokens not in self._of:  # the same for all layers
            self._of[tokens] = mx.repeat(self._rows, tokens // self._rows.shape[0])
        return self._of[tokens]


class Gathered(nn.Module):
    """`linear` with a term for each row of the batch, by the slots of `selection`."""

    def __init__(self, linear: nn.Module, shape: tuple[int, ...], selection: Selection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        self._shape = shape  # of the weight: out, in
        self._selection = selection
        # [slots, rank, in] and [slots, out, rank], once there is an adapter of this layer
        self._a: mx.array | None = None
        self._b: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        if self._a is None or self._b is None:
            return y
        flat = x.reshape(-1, x.shape[-1])
        slots = self._selection.of(flat.shape[0])
        term = ops.gathered_low_rank(flat, self._a, self._b, slots)
        return y + term.reshape(y.shape).astype(y.dtype)

    def fill(self, slot: int, slots: int, term: LowRank | None, scale: float) -> None:
        """Put a term into a slot, or nothing."""
        if term is None and self._a is None:
            return
        a, b = self._with_room(slots, term.rank if term else 1)
        self._a = self._b = None  # so that they are written in place
        rank = a.shape[1]
        if term is None:
            new_a, new_b = mx.zeros((rank, a.shape[2])), mx.zeros((b.shape[1], rank))
        else:
            wider = rank - term.rank
            new_a = mx.pad(term.a.T, [(0, wider), (0, 0)])
            new_b = mx.pad(scale * term.b.T, [(0, 0), (0, wider)])
        at = mx.array([slot])
        self._a = mx.slice_update(a, new_a[None], at, axes=(0,))
        self._b = mx.slice_update(b, new_b[None], at, axes=(0,))

    def _with_room(self, slots: int, rank: int) -> tuple[mx.array, mx.array]:
        """The two arrays, with room for a term of this rank."""
        out, width = self._shape
        rank = -(-rank // RANKS) * RANKS
        if self._a is None or self._b is None:
            return mx.zeros((slots, rank, width)), mx.zeros((slots, out, rank))
        more = max(0, rank - self._a.shape[1])
        return (
            mx.pad(self._a, [(0, 0), (0, more), (0, 0)]) if more else self._a,
            mx.pad(self._b, [(0, 0), (0, 0), (0, more)]) if more else self._b,
        )

    @property
    def stacks(self) -> list[mx.array]:
        return [a for a in (self._a, self._b) if a is not None]


class Shadow:
    """The second model, and its slots. To be used in the thread that owns MLX."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        """`slots` adapters can be there at a time."""
        self.model = copy.deepcopy(model)  # arrays are shared
        self._slots = slots + 1
        self._selection = Selection()
        self._layers: dict[str, Gathered] = {}
        for module in adaptable(self.model):
            if module.role is not Role.EXPERT:
                place = place_at(self.model, module.path)
                layer = Gathered(place.get(), module.shape, self._selection)
                self._layers[module.path] = layer
                place.set(layer)
        route(self.model)  # blocks with such layers run as mlx-lm wrote them

    def fill(self, slot: int, terms: Mapping[str, LowRank], scale: float) -> None:
        """Put an adapter into slot 1, 2, ..., in place of what was there."""
        for path, layer in self._layers.items():
            layer.fill(slot, self._slots, terms.get(path), scale)
        mx.eval([layer.stacks for layer in self._layers.values()])

    def select(self, slots: Sequence[int]) -> None:
        """The slots of the rows of the next batch."""
        self._selection.set(slots)

    @property
    def nbytes(self) -> int:
        """Of the terms in all slots."""
        return sum(a.nbytes for layer in self._layers.values() for a in layer.stacks)
