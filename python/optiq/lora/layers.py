"""Linear layers, and embeddings, with a low-rank term beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..models.kinds import is_embedding
from ..models.places import place_at
from ..nn.layers import dequantized
from ..ops import add_low_rank


class LowRank(NamedTuple):
    """What an adapter adds to one layer's output: scale * x @ a @ b, as mlx-lm writes it.

    To an embedding it adds scale * a[ids] @ b.
    """

    a: mx.array  # [in, rank], of an embedding [vocabulary, rank]
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
        y = add_low_rank(self.linear(x), x, self.lora_a, self.lora_b, self.scale)
        return y if self._minus is None else add_low_rank(y, x, *self._minus, -self.scale)


class DoRALinear(LoRALinear):
    """The rows of the weight and the term together have the lengths that `magnitude` gives."""

    def __init__(self, linear: nn.Module, term: LowRank, scale: float, magnitude: mx.array) -> None:
        super().__init__(linear, term, scale)
        self._gain = gain(linear, term, scale, magnitude)
        self._bias = linear.get("bias", 0.0)

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        scaled: mx.array = self._gain * (y - self._bias) + self._bias
        return scaled.astype(y.dtype)


class LoRAEmbedding(nn.Module):
    """Only where tokens are read: an embedding that also is the head is refused before."""

    def __init__(self, embedding: nn.Module, term: LowRank, scale: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = embedding
        self.lora_a, self.lora_b = term
        self.scale = scale

    def __call__(self, ids: mx.array) -> mx.array:
        y: mx.array = self.embedding(ids)
        return y + (self.scale * self.lora_a[ids] @ self.lora_b).astype(y.dtype)


def gain(linear: nn.Module, term: LowRank, scale: float, magnitude: mx.array) -> mx.array:
    """What the sum of a layer's product and its term is multiplied with in DoRA, `[out]`."""
    lengths = mx.linalg.norm(dense(linear) + scale * (term.a @ term.b).T, axis=1)
    return mx.where(lengths > 0, magnitude / lengths, 0)  # a row of zeros stays one


def dense(layer: Any) -> mx.array:
    """The weight that a layer holds or stands for, in float32, [out, in] or [vocabulary, width]."""
    weight: mx.array = dequantized(layer) if "scales" in layer else layer["weight"]
    return weight.astype(mx.float32)


def put(
    model: nn.Module,
    terms: Mapping[str, LowRank],
    scale: float,
    minus: Mapping[str, LowRank] | None = None,
    magnitudes: Mapping[str, mx.array] | None = None,
) -> dict[str, LoRALinear]:
    """Put a low-rank term beside each layer of `terms`, in place; returns the new linear layers."""
    layers: dict[str, LoRALinear] = {}
    for path, term in terms.items():
        place = place_at(model, path)
        if is_embedding(place.get()):
            place.set(LoRAEmbedding(place.get(), term, scale))
            continue
        if magnitudes:
            layers[path] = DoRALinear(place.get(), term, scale, magnitudes[path])
        else:
            layers[path] = LoRALinear(place.get(), term, scale, (minus or {}).get(path))
        place.set(layers[path])
    return layers


def joined(plus: LowRank, minus: LowRank) -> LowRank:
    """One term, of both ranks together, for the difference of two."""
    return LowRank(
        mx.concatenate([plus.a, minus.a], axis=1), mx.concatenate([plus.b, -minus.b], axis=0)
    )
