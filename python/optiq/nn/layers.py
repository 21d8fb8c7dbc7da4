"""The layers of mlx and mlx-lm that hold large weights, with native products."""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import mla, switch_layers

from .. import ops
from ..ops import native
from . import tiled

M = TypeVar("M", bound="Adopting")

# On the CPU, dequantizing an nvfp4 weight costs as much as the stock product with so many rows.
NVFP4_ROWS = 16


_mixed: dict[tuple[type, type], Any] = {}


class Adopting(nn.Module):
    """Mixed into a module class that takes the place of another with the same parameters.

    `__init__` would fill the new module with random weights first. `adopt` skips it and takes over
    what the other module holds: parameters, children and attributes.
    """

    exact = True  # of quantized weights, see `accelerate`

    @classmethod
    def empty(cls: type[M]) -> M:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        return layer

    @classmethod
    def adopt(cls: type[M], module: nn.Module) -> M:
        layer = cls.empty()
        layer.__dict__.update(module.__dict__)
        dict.update(layer, module)
        return layer

    @classmethod
    def mixed_into(cls: type[M], module: nn.Module) -> M:
        """`module` as one of this class and of its own, under the name of that: others go by it."""
        own = type(module)
        if (cls, own) not in _mixed:
            _mixed[cls, own] = type(own.__name__, (cls, own), {"__module__": own.__module__})
        made: M = _mixed[cls, own].adopt(module)
        return made


def _activation(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if native.on_cpu() else x


class Linear(Adopting, nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = ops.linear(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


class QuantizedLinear(Adopting, nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        y = tiled.product(self, x)
        y = _product(self, x) if y is None else y
        return y + self["bias"] if "bias" in self else y


class Embedding(Adopting, nn.Embedding):
    def __call__(self, ids: mx.array) -> mx.array:
        return _activation(self["weight"][ids])

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.linear(x, self["weight"])


class QuantizedEmbedding(Adopting, nn.QuantizedEmbedding):
    def __call__(self, ids: mx.array) -> mx.array:
        ext = native.active()
        if ext is not None and self.mode == "affine":
            arrays = arrays_of(self)
            if not any(map(ext.traced, (ids, *arrays))):
                rows: mx.array = ext.embedding(ids, *arrays, self.group_size, self.bits)
                return rows
        if native.on_cpu():
            return dequantized(self, ids)
        out: mx.array = super().__call__(ids)  # type: ignore[no-untyped-call]
        return out

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class SwitchLinear(Adopting, switch_layers.SwitchLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows, experts, shape = expert_rows(x, indices)
        y = ops.linear(rows, self["weight"], indices=experts).reshape(*shape, -1)
        return _expert_bias(self, y, indices)


class QuantizedSwitchLinear(Adopting, switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if not (sorted_indices or native.on_cpu()):  # stock MLX needs no row for each index
            return super().__call__(x, indices)  # type: ignore[no-any-return]
        rows, experts, shape = expert_rows(x, indices)
        y = _product(self, rows, indices=experts, ordered=sorted_indices).reshape(*shape, -1)
        return _expert_bias(self, y, indices)


class MultiLinear(Adopting, mla.MultiLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if not native.active():
            return super().__call__(_activation(x), transpose)  # type: ignore[no-any-return]
        rows, heads, shape = _head_rows(x, self["weight"].shape[0])
        y = ops.linear(rows, self["weight"], transpose=transpose, indices=heads)
        return y.reshape(*shape, -1)


class QuantizedMultiLinear(Adopting, mla.QuantizedMultiLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        if self.mode != "affine" or not native.active():
            return super().__call__(_activation(x), transpose)  # type: ignore[no-any-return]
        rows, heads, shape = _head_rows(x, self["weight"].shape[0])
        return _product(self, rows, indices=heads, transpose=transpose).reshape(*shape, -1)


class RMSNorm(Adopting, nn.RMSNorm):
    """The norm after the blocks, for the same bits as in one node with them (nn/stack.py)."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self["weight"], self.eps)


def stock_classes() -> dict[type[nn.Module], type[Adopting]]:
    """Stock class -> native class."""
    return {
        nn.Linear: Linear,
        nn.QuantizedLinear: QuantizedLinear,
        nn.Embedding: Embedding,
        nn.QuantizedEmbedding: QuantizedEmbedding,
        switch_layers.SwitchLinear: SwitchLinear,
        switch_layers.QuantizedSwitchLinear: QuantizedSwitchLinear,
        mla.MultiLinear: MultiLinear,
        mla.QuantizedMultiLinear: QuantizedMultiLinear,
    }


def arrays_of(layer: Any) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of a layer that is quantized affinely."""
    return layer["weight"], layer["scales"], layer["biases"]


def dequantized(layer: Any, rows: Any = ...) -> mx.array:
    """The weight that a quantized layer stands for, or these rows of it, in float32."""
    codes, scales = layer["weight"][rows], layer["scales"][rows]
    if "biases" in layer:
        biases = layer["biases"][rows]
        return ops.AffineWeight(codes, scales, biases, layer.group_size, layer.bits).dequantized()
    return mx.dequantize(
        codes, scales, None, layer.group_size, layer.bits, mode=layer.mode, dtype=mx.float32
    )


def _product(
    layer: Any,
    x: mx.array,
    indices: mx.array | None = None,
    transpose: bool = True,
    ordered: bool = False,
) -> mx.array:
    if layer.mode == "nvfp4":
        return _nvfp4_product(layer, x, indices)
    return ops.quantized_matmul(
        x,
        layer["weight"],
        layer["scales"],
        layer["biases"],
        transpose,
        group_size=layer.group_size,
        bits=layer.bits,
        indices=indices,
        sorted_indices=ordered,
        exact=layer.exact,
    )


def _nvfp4_product(layer: Any, x: mx.array, indices: mx.array | None) -> mx.array:
    """The stock product, but native with the dequantized weight for many rows on the CPU.

    Experts are not dequantized: all of them together may be large.
    """
    x = _activation(x)
    weight = layer["weight"], layer["scales"], None
    options = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if indices is not None:
        return mx.gather_qmm(x[:, None, :], *weight, rhs_indices=indices, **options).squeeze(-2)
    if native.active() and x.size > NVFP4_ROWS * x.shape[-1]:
        return ops.linear(x, dequantized(layer))
    return mx.quantized_matmul(x, *weight, **options)


Rows = tuple[mx.array, mx.array, tuple[int, ...]]


def expert_rows(x: mx.array, indices: mx.array) -> Rows:
    """Lay `x [..., n, in]` and `indices [...]`, broadcast together, out as one row per index.

    Returns the rows, the expert of each, and the shape that they had.
    """
    batch = np.broadcast_shapes(x.shape[:-2], indices.shape)
    return _laid_out(mx.broadcast_to(x, (*batch, *x.shape[-2:])), indices[..., None])


def _head_rows(x: mx.array, heads: int) -> Rows:
    """Lay `x [..., heads or 1, n, in]` out as one row for each head, as `expert_rows` does."""
    rows = mx.broadcast_to(x, (*x.shape[:-3], heads, *x.shape[-2:]))
    return _laid_out(rows, mx.arange(heads)[:, None])


def _laid_out(rows: mx.array, of: mx.array) -> Rows:
    shape = tuple(rows.shape[:-1])
    numbers = mx.broadcast_to(of.astype(mx.uint32), shape).flatten()
    return rows.reshape(-1, rows.shape[-1]), numbers, shape


def _expert_bias(layer: nn.Module, y: mx.array, indices: mx.array) -> mx.array:
    return y + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else y
