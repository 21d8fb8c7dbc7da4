"""The case table of a decoder layer in few launches; see cases.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..formats import AFFINE_BITS, DENSE, Format
from . import reference
from .affine import AffineWeight
from .attention_cases import any_records, normal
from .cases import DTYPES, EPS, f64
from .layer import Formats, Layer, Norm
from .reference import Float64

PLAIN = DENSE, DENSE
EPSILON = 1e-5
W2, W3, W4, W5, W6, W8 = (Format("affine", bits, 32) for bits in AFFINE_BITS)


@dataclass(frozen=True)
class LayerCase:
    """A layer, what goes past it, and caches full of other tokens.

    One format of `qkv` is all in one weight, two are those of a layer whose values are its keys;
    one of `gate_up` is both in one.
    """

    name: str = ""
    qkv: tuple[Format, ...] = (W4, W6, W8)
    out: Format = W3
    gate_up: tuple[Format, ...] = (W4, W5)
    down: Format = W2
    dtype: str = "f16"
    scales: str = ""  # `dtype` unless given
    batch: int = 1
    keys: int = 21  # with the new one
    formats: Formats = PLAIN
    width: int = 96
    hidden: int = 160
    dim: int = 32
    heads: int = 6
    kv_heads: int = 2
    head_norms: bool = False
    post_norms: bool = False
    bias: bool = False
    gelu: bool = False
    traditional: bool = False
    sinks: bool = False
    softcap: float = 0.0
    gain: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def place(self) -> tuple[int, int, int]:
        return self.keys - 1, self.keys, self.keys - 1

    @cached_property
    def layer(self) -> Layer:
        attended, stored = self.heads * self.dim, self.kv_heads * self.dim
        rows = {1: (attended + 2 * stored,), 2: (attended, stored), 3: (attended, stored, stored)}
        qkv = self._weights(10, rows[len(self.qkv)], self.width, self.qkv)
        gated = (2 * self.hidden,) if len(self.gate_up) == 1 else (self.hidden,) * 2
        pairs = self.dim // 4
        (out,) = self._weights(20, (self.width,), attended, (self.out,))
        (down,) = self._weights(40, (self.width,), self.hidden, (self.down,))
        return Layer(
            self.width, qkv, out, self._weights(30, gated, self.width, self.gate_up), down,
            self.heads, self.kv_heads, self.dim, self.dim**-0.5,
            norm=self._norm(2), mlp_norm=self._norm(3),
            q_norm=self._norm(4, self.dim) if self.head_norms else None,
            k_norm=self._norm(5, self.dim) if self.head_norms else None,
            v_eps=EPSILON if len(qkv) == 2 else None,
            post_norm=self._norm(6) if self.post_norms else None,
            mlp_post_norm=self._norm(7) if self.post_norms else None,
            bias=0.1 * normal(sum(rows[len(self.qkv)]), seed=8) if self.bias else None,
            rope=(2 * pairs, self.traditional, mx.array(1e4 ** -(np.arange(pairs) / pairs)), 1.0),
            sinks=normal(self.heads, seed=9) if self.sinks else None,
            softcap=self.softcap, gain=self.gain, gelu=self.gelu,
        )  # fmt: skip

    @cached_property
    def h(self) -> mx.array:
        return normal(self.batch, 1, self.width, seed=1).astype(DTYPES[self.dtype])

    @cached_property
    def caches(self) -> tuple[mx.array, mx.array]:
        """With room for more."""
        shape, dtype = (self.batch, self.kv_heads, self.keys + 19), DTYPES[self.dtype]
        k, v = (
            normal(*shape, self.dim, seed=seed).astype(dtype)
            if fmt == DENSE
            else any_records(shape, self.dim, fmt, seed)
            for seed, fmt in zip((30, 31), self.formats, strict=True)
        )
        return k, v

    def part(self, h: mx.array, *caches: mx.array) -> float:
        """Infinitely far where a cache has changed beside the new token."""
        truth, eps = self.truth(caches), EPS[self.dtype]
        # A rounding of each of the six results that are handed on, and those of sums in float32.
        bound = 3 * eps * np.abs(truth).max() + 1e-5
        parts = [np.abs(f64(h)[:, 0] - truth).max() / bound]
        at = self.keys - 1
        for got, was, new, fmt in zip(
            caches, self.caches, self._new_tokens()[1:], self.formats, strict=True
        ):
            kept = mx.array([i for i in range(got.shape[2]) if i != at])
            if not mx.array_equal(got[:, :, kept], was[:, :, kept]):
                return math.inf
            step = 0 if fmt == DENSE else (new.max() - new.min()) / (2**fmt.bits - 1)
            angle = at * EPS["f32"]  # of the fastest pair, by what float32 makes of it
            bound = 0.6 * step + (2 * eps + angle) * np.abs(new).max() + 1e-5
            parts.append(np.abs(self._decoded(got, fmt)[:, :, at] - new[:, :, 0]).max() / bound)
        return float(np.max(parts))  # NaN if one is

    def truth(self, caches: Sequence[mx.array]) -> Float64:
        """h after the layer, with the keys and values that are in the caches: [batch, width]."""
        layer = self.layer
        k, v = (
            self._decoded(c, f)[:, :, : self.keys]
            for c, f in zip(caches, self.formats, strict=True)
        )
        sinks = None if layer.sinks is None else f64(layer.sinks)
        q = self._new_tokens()[0]
        y = reference.attention(q, k, v, layer.scale, None, sinks, layer.softcap)
        y = y.reshape(self.batch, -1) @ f64(layer.out).T
        h = f64(self.h)[:, 0] + self.gain * _normed(y, layer.post_norm)
        gate_up = np.concatenate([f64(w) for w in layer.gate_up])
        gate, up = np.split(_normed(h, layer.mlp_norm) @ gate_up.T, 2, axis=-1)
        y = reference.gated(gate, up, "gelu_tanh" if self.gelu else "silu") @ f64(layer.down).T
        return np.asarray(h + self.gain * _normed(y, layer.mlp_post_norm))

    def _new_tokens(self) -> tuple[Float64, Float64, Float64]:
        """Queries, keys and values: [batch, heads, 1, dim]."""
        layer = self.layer
        y = _normed(f64(self.h)[:, 0], layer.norm) @ np.concatenate([f64(w) for w in layer.qkv]).T
        y = y if layer.bias is None else y + f64(layer.bias)
        y = y.reshape(self.batch, -1, 1, self.dim)
        q, k, v = np.split(y, [self.heads, self.heads + self.kv_heads], axis=1)
        v = v if v.size else k
        assert layer.rope is not None
        _, traditional, frequencies, _ = layer.rope
        q, k = (
            reference.rotate(_normed(a, n), [self.keys - 1], f64(frequencies), traditional)
            for a, n in ((q, layer.q_norm), (k, layer.k_norm))
        )
        return q, k, v if layer.v_eps is None else reference.rms_norm(v, None, layer.v_eps)

    def _decoded(self, cache: mx.array, fmt: Format) -> Float64:
        if fmt == DENSE:
            return f64(cache)
        return reference.dequantize_kv(np.array(cache), self.dim, fmt.group_size, fmt.bits)

    def _norm(self, seed: int, n: int = 0) -> Norm:
        return 1 + 0.1 * normal(n or self.width, seed=seed), EPSILON

    def _weights(
        self, seed: int, rows: Sequence[int], columns: int, formats: Sequence[Format]
    ) -> tuple[AffineWeight, ...]:
        made = []
        for i, (n, fmt) in enumerate(zip(rows, formats, strict=True)):
            w = (columns**-0.5 * normal(n, columns, seed=seed + i)).astype(
                DTYPES[self.scales or self.dtype]
            )
            of = fmt.group_size, fmt.bits
            made.append(AffineWeight(*mx.quantize(w, *of), *of))
        return tuple(made)


def _normed(x: Float64, norm: Norm | None) -> Float64:
    return x if norm is None else reference.rms_norm(x, f64(norm[0]), norm[1])


# Of each family what is there, and widths that go round.
LAYERS = [
    LayerCase("llama"),
    LayerCase("llama, 5 rows", (W3, W3, W8), W4, (W6, W4), W8, batch=5),
    LayerCase("llama, 16 rows in bf16", (W4, W4, W4), W4, (W4, W4), W4, "bf16",
              batch=16),
    LayerCase("qwen3", (W8, W5, W4), W6, (W2, W2), W3, head_norms=True),
    LayerCase("qwen2, records", (W4, W4, W4), W4, (W8, W8), W8, bias=True,
              formats=(W8, W4)),
    LayerCase("phi3, 2 rows", (W4,), W3, (W4,), W2, batch=2, formats=(W4, W8),
              traditional=True),
    LayerCase("gemma3", dtype="f32", head_norms=True, post_norms=True, gelu=True),
    LayerCase("gemma4", (W4, W6), head_norms=True, post_norms=True, gelu=True),
    LayerCase("gpt_oss, softcap", bias=True, sinks=True, softcap=3.0, scales="bf16"),
    LayerCase("granite", batch=3, gain=0.25),
]  # fmt: skip
