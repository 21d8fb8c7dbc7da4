"""The layers of mlx and mlx-lm that hold large weights, with native products."""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers

from .. import ops
from ..ops import native

M = TypeVar("M", bound="_Adopting")


class _Adopting(nn.Module):
    """Makes a layer out of another's parameters, without initialising random ones first."""

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


def _activation(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if native.on_cpu() else x


class Linear(_Adopting, nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        y = ops.linear(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


class QuantizedLinear(_Adopting, nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class Embedding(_Adopting, nn.Embedding):
    def __call__(self, ids: mx.array) -> mx.array:
        return _activation(self["weight"][ids])

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.linear(x, self["weight"])


class QuantizedEmbedding(_Adopting, nn.QuantizedEmbedding):
    def __call__(self, ids: mx.array) -> mx.array:
        return mx.dequantize(
            self["weight"][ids],
            _activation(self["scales"][ids]),
            _activation(self["biases"][ids]),
            group_size=self.group_size,
            bits=self.bits,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class SwitchLinear(_Adopting, switch_layers.SwitchLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows, experts, shape = _expert_rows(x, indices)
        y = ops.linear(rows, self["weight"], indices=experts).reshape(*shape, -1)
        return _expert_bias(self, y, indices)


class QuantizedSwitchLinear(_Adopting, switch_layers.QuantizedSwitchLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows, experts, shape = _expert_rows(x, indices)
        y = _product(self, rows, indices=experts).reshape(*shape, -1)
        return _expert_bias(self, y, indices)


def stock_classes() -> dict[type[nn.Module], type[_Adopting]]:
    """Stock class -> native class."""
    return {
        nn.Linear: Linear,
        nn.QuantizedLinear: QuantizedLinear,
        nn.Embedding: Embedding,
        nn.QuantizedEmbedding: QuantizedEmbedding,
        switch_layers.SwitchLinear: SwitchLinear,
        switch_layers.QuantizedSwitchLinear: QuantizedSwitchLinear,
    }


def _product(layer: Any, x: mx.array, indices: mx.array | None = None) -> mx.array:
    return ops.quantized_matmul(
        x,
        layer["weight"],
        layer["scales"],
        layer["biases"],
        group_size=layer.group_size,
        bits=layer.bits,
        indices=indices,
    )


def _expert_rows(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, tuple[int, ...]]:
    """Lay `x [..., 1, in]`, broadcast over `indices [...]`, out as one row per index."""
    rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:]))
    shape = tuple(rows.shape[:-1])
    per_index = rows.shape[-2]
    experts = indices.flatten().astype(mx.uint32)
    if per_index > 1:
        experts = mx.repeat(experts, per_index)
    return rows.reshape(-1, x.shape[-1]), experts, shape


def _expert_bias(layer: nn.Module, y: mx.array, indices: mx.array) -> mx.array:
    return y + mx.expand_dims(layer["bias"][indices], -2) if "bias" in layer else y
