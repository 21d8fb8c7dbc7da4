"""What the extension's `decode_layer` computes on a GPU, of `mx.*`, where a CPU says it is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from optiq.ops import AffineWeight, native
from optiq.ops.attention import capped_attention

EXT: Any = native.extension  # whatever a test puts in its place


@dataclass(frozen=True)
class Described:
    """The arguments of the extension's DecodeLayer."""

    native: Any
    given: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


def decode_layer(
    layer: Described, h: mx.array, keys: mx.array, values: mx.array, place: tuple[int, int, int]
) -> list[mx.array]:
    g, (token, length, position) = layer.given, place
    heads, kv_heads, dim = g["heads"], g["kv_heads"], g["dim"]
    x = h.astype(mx.float32)
    y = products(normed(x, g["norm"]), g["qkv"])
    y = (y if g["bias"] is None else y + g["bias"]).reshape(len(h), -1, 1, dim)
    q, k, v = y[:, :heads], y[:, heads : heads + kv_heads], y[:, heads + kv_heads :]
    v = v if v.size else k
    v = v if g["v_eps"] is None else mx.fast.rms_norm(v, None, g["v_eps"])
    q, k = (
        rotated(normed(a, n), g["rope"], position) for a, n in ((q, g["q_norm"]), (k, g["k_norm"]))
    )
    caches, seen = [], []
    for cache, new, (group_size, bits) in (
        (keys, k, g["k_format"]),
        (values, v, g["v_format"]),
    ):
        new = new.astype(h.dtype)
        new = EXT.quantize_kv(new, group_size, bits) if bits else new
        cache = mx.concatenate([cache[:, :, :token], new, cache[:, :, token + 1 :]], axis=2)
        caches.append(cache)
        part = cache[:, :, :length]
        if bits:
            part = EXT.dequantize_kv(part, dim, group_size, bits, mx.float32)
        seen.append(part.astype(mx.float32))
    if g["softcap"]:
        y = capped_attention(q * g["scale"], *seen, None, g["softcap"], g["sinks"])
    else:
        y = mx.fast.scaled_dot_product_attention(q, *seen, scale=g["scale"], sinks=g["sinks"])
    y = products(y.reshape(len(h), 1, -1), [g["out"]])
    x = x + g["gain"] * normed(y, g["post_norm"])
    gate, up = mx.split(products(normed(x, g["mlp_norm"]), g["gate_up"]), 2, axis=-1)
    y = products((nn.gelu_approx(gate) if g["gelu"] else nn.silu(gate)) * up, [g["down"]])
    x = x + g["gain"] * normed(y, g["mlp_post_norm"])
    return [x.astype(h.dtype), *caches]


def normed(x: mx.array, norm: tuple[mx.array, float] | None) -> mx.array:
    return x if norm is None else mx.fast.rms_norm(x, *norm)


def products(x: mx.array, weights: Any) -> mx.array:
    return mx.concatenate([x @ AffineWeight(*w).dequantized().T for w in weights], axis=-1)


def rotated(x: mx.array, rope: Any, position: int) -> mx.array:
    if rope is None:
        return x
    dims, traditional, frequencies, magnitude = rope
    angle = position * frequencies
    c, s = magnitude * mx.cos(angle), magnitude * mx.sin(angle)
    pairs, rest = x[..., :dims], x[..., dims:]
    if traditional:
        a, b = pairs[..., ::2], pairs[..., 1::2]
        turned = mx.stack([a * c - b * s, a * s + b * c], axis=-1).reshape(pairs.shape)
    else:
        a, b = mx.split(pairs, 2, axis=-1)
        turned = mx.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    return mx.concatenate([turned, rest], axis=-1)
