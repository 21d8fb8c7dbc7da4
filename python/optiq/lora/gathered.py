"""Many adapters beside one model, each row of a batch with its own.

`shadow` makes a second model of the same weights, in which every linear layer can add the term of
an adapter to each row. Slot 0 is none. The first model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..kv import route
from ..models.adaptable import adaptable
from ..models.places import place_at
from ..models.roles import Role
from ..nn.adapted import Adapted, Selection
from ..ops import LowRankTerms
from ..ops.low_rank import Pair, halves
from .adapter import Adapter
from .layers import gain


class Halved(NamedTuple):
    """An adapter as the layers of a shadow take it: terms in 16 bits, and the gains of DoRA."""

    terms: Mapping[str, Pair]
    gains: Mapping[str, mx.array]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.terms.values()) + sum(
            found.nbytes for found in self.gains.values()
        )


def halved(adapter: Adapter, model: nn.Module) -> Halved:
    """An adapter of `model`. Takes a while, and with DoRA as long as to read all its layers."""
    terms, gains = dict(adapter.exact), {}
    for path, magnitude in adapter.magnitudes.items():
        layer = place_at(model, path).get()
        found = gain(layer, adapter.terms[path], adapter.scale, magnitude).astype(mx.float32)
        mx.eval(found)  # a weight at a time
        a, b = terms[path]
        gains[path], terms[path] = found, (a, b * np.asarray(found))
    return Halved(halves(terms, adapter.scale), gains)


class Shadow:
    """The second model, and its slots. To be used in the thread that owns MLX."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        """`slots` adapters can be there at a time."""
        self.model = copy.deepcopy(model)  # arrays are shared
        self._selection = Selection()
        self._terms: dict[str, LowRankTerms] = {}
        for module in adaptable(self.model):
            if module.role is not Role.EXPERT:
                place = place_at(self.model, module.path)
                out, width = module.shape
                terms = LowRankTerms(slots + 1, width, out)
                self._terms[module.path] = terms
                place.set(Adapted(place.get(), terms, self._selection))
        route(self.model)  # for blocks that run as mlx-lm wrote them

    def fill(self, slot: int, adapter: Halved) -> None:
        """Put an adapter into slot 1, 2, ..., in place of what was there."""
        for path, of_layer in self._terms.items():
            of_layer.put(slot, adapter.terms.get(path), adapter.gains.get(path))

    def select(self, slots: Sequence[int]) -> None:
        """The slots of the rows of the next batch."""
        self._selection.set(slots)
