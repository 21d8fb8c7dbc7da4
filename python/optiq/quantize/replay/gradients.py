"""From the gradient at a layer's output to the gradient at its weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...models.kinds import Kind, kind_of, stock_class

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
# One call of a module: its args and kwargs, and the gradient at its output.
Call = tuple[Sequence[Any], dict[str, Any], mx.array]


def looked_up(layer: nn.Module, calls: Sequence[list[Call]]) -> tuple[Any, Sequence[list[Call]]]:
    """An embedding of only the rows that `calls` look up, and the calls with places in it.

    Other rows have no gradient. Layers that are not embeddings come back as they are.
    """
    if not isinstance(layer, nn.Embedding):
        return layer, calls
    ids = np.unique(np.concatenate([np.ravel(args[0]) for of in calls for args, _, _ in of]))
    places = np.zeros(layer.weight.shape[0], dtype=np.int32)
    places[ids] = np.arange(len(ids))
    part = copy.copy(layer)
    part.weight = layer.weight[mx.array(ids)]
    found: list[list[Call]] = [
        [((mx.array(places)[args[0]],), kw, g) for args, kw, g in of] for of in calls
    ]
    return part, found


def some_rows(
    layer: nn.Module, calls: Sequence[list[Call]], elements: int
) -> tuple[Any, Sequence[list[Call]], float]:
    """A layer of rows evenly spread over a weight of more than so many elements, its calls, and how
    many rows each of them stands for. Lookups and weights for each head come back as they are.
    """
    step = -(-layer.weight.size // elements)
    if step == 1 or kind_of(layer) is Kind.HEADS or isinstance(layer, nn.Embedding):
        return layer, calls, 1.0
    part = copy.copy(layer)
    part.weight = layer.weight[..., ::step, :]
    fewer = [[(args, kw, g[..., ::step]) for args, kw, g in of] for of in calls]
    return part, fewer, layer.weight.size / part.weight.size


def weight_gradient(layer: nn.Module, calls: Sequence[Call]) -> FloatArray:
    """Gradient at the weight of a linear, stacked or looked up layer, summed over its calls."""
    linear: Any = copy.copy(layer)
    linear.pop("bias", None)
    zeros = mx.zeros(layer.weight.shape)
    total = zeros
    for args, kwargs, gradient in calls:

        def apply(weight: mx.array, args: Any = args, kwargs: Any = kwargs) -> mx.array:
            linear.weight = weight
            out: mx.array = stock_class(linear).__call__(linear, *args, **kwargs)
            return out

        total = total + mx.vjp(apply, [zeros], [gradient])[1][0]
    return np.asarray(total)


def add_calls(calls: list[Call], more: list[Call]) -> list[Call]:
    """Calls of two passes over the same code, with their gradients added; one may be missing."""
    if not calls or not more:
        return calls or more
    return [(args, kw, g + h) for (args, kw, g), (_, _, h) in zip(calls, more, strict=True)]
