"""Linear layers with a low-rank term beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..models.places import place_at


class LowRank(NamedTuple):
    """What an adapter adds to one layer's output: scale * x @ a @ b, as mlx-lm writes it."""

    a: mx.array  # [in, rank]
    b: mx.array  # [rank, out]

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])


class LoRALinear(nn.Module):
    """`linear` stays as it is; its two small matrices have the names that mlx-lm gives them.

    `minus` is a term that is taken away again and not trained.
    """

    def __init__(
        self, linear: nn.Module, term: LowRank, scale: float, minus: LowRank | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        self.lora_a, self.lora_b = term
        self.scale = scale
        self._minus = minus

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        x = x.astype(self.lora_a.dtype)
        z = (x @ self.lora_a) @ self.lora_b
        if self._minus is not None:
            z = z - (x @ self._minus.a) @ self._minus.b
        return y + (self.scale * z).astype(y.dtype)


def put(
    model: nn.Module,
    terms: Mapping[str, LowRank],
    scale: float,
    minus: Mapping[str, LowRank] | None = None,
) -> dict[str, LoRALinear]:
    """Put a low-rank term beside each layer of `terms`, in place; returns the new layers."""
    layers = {}
    for path, term in terms.items():
        place = place_at(model, path)
        layers[path] = LoRALinear(place.get(), term, scale, (minus or {}).get(path))
        place.set(layers[path])
    return layers


def joined(plus: LowRank, minus: LowRank) -> LowRank:
    """One term, of both ranks together, for the difference of two."""
    return LowRank(
        mx.concatenate([plus.a, minus.a], axis=1), mx.concatenate([plus.b, -minus.b], axis=0)
    )
