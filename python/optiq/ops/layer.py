"""A decoder layer as plain values, as the launches for one new token take it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..formats import DENSE, Format
from .affine import AffineWeight

Norm = tuple[mx.array, float]  # gains in float32, epsilon
Formats = tuple[Format, Format]  # of keys and of values


@dataclass(frozen=True)
class Layer:
    """`h + gain * post(attention(norm(h)))`, then the same with a gated MLP.

    `qkv` are three weights; or one whose rows are queries, keys and values; or two where the values
    are the keys before norm and rotation. `gate_up` are two, or one with the rows of both. `rope`:
    how many values of a head are rotated, whether pairs are neighbours, radians per token of each
    pair, and what factor the rotated values get. `bias` is that of all columns of `qkv`. What
    vectors there are is in float32.
    """

    width: int
    qkv: tuple[AffineWeight, ...]
    out: AffineWeight
    gate_up: tuple[AffineWeight, ...]
    down: AffineWeight
    heads: int
    kv_heads: int
    dim: int  # of a head
    scale: float
    norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_eps: float | None = None  # of a norm without gains
    post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    bias: mx.array | None = None
    rope: tuple[int, bool, mx.array, float] | None = None
    sinks: mx.array | None = None
    softcap: float = 0.0
    gain: float = 1.0
    gelu: bool = False  # by tanh, else SiLU

    @property
    def weights(self) -> tuple[AffineWeight, ...]:
        return (*self.qkv, self.out, *self.gate_up, self.down)

    def launch(self, dtype: mx.Dtype, batch: int, formats: Formats) -> tuple[Hashable, ...]:
        """What kernels are compiled for, for `metal.proven`."""
        scales = self.out.scales.dtype
        shared = self.heads // self.kv_heads
        post = self.post_norm is not None or self.mlp_post_norm is not None
        groups = (self.qkv, (self.out,), self.gate_up, (self.down,))
        widths = (tuple(Format("affine", w.bits, w.group_size) for w in group) for group in groups)
        return dtype, scales, batch, self.dim, shared, *formats, post, *widths

    def native(self, ext: ModuleType, dtype: mx.Dtype, formats: Formats) -> Any:
        """The extension's, for activations of this type and caches of these formats."""
        k_format, v_format = ((0, 0) if f == DENSE else (f.group_size, f.bits) for f in formats)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ext.DecodeLayer(**given, dtype=dtype, k_format=k_format, v_format=v_format)
