"""A weight in affine codes, as `mx.quantize` stores it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..formats import AFFINE_BITS, AFFINE_GROUPS
from . import native


class AffineWeight(NamedTuple):
    """A quantized weight `[..., out, in]` as `mx.quantize` stores it: `scale * code + bias`.

    `codes` are uint32 `[..., out, in * bits / 32]`, `scales` and `biases`
    `[..., out, in / group_size]` in one floating dtype.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int = 64
    bits: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: `[..., out, in]`."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

    def dequantized(self) -> mx.array:
        """The weight that is stored, float32."""
        ext = native.active()
        if ext is not None and not any(map(ext.traced, self[:3])):
            found: mx.array = ext.dequantize(*self)
            return found
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.codes, scales, biases, self.group_size, self.bits)

    def check(self, name: str) -> None:
        """Raise ValueError, naming the weight `name`, where its parts do not fit together."""
        codes, scales, biases = self.codes, self.scales, self.biases
        if self.bits not in AFFINE_BITS:
            raise ValueError(f"{name}.bits is {self.bits}; it must be 2, 3, 4, 5, 6 or 8")
        if self.group_size not in AFFINE_GROUPS:
            raise ValueError(f"{name}.group_size is {self.group_size}; it must be 32, 64 or 128")
        if codes.dtype != mx.uint32:
            raise ValueError(f"{name}.w is {codes.dtype}; packed codes are uint32")
        if scales.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            raise ValueError(
                f"{name}.scales is {scales.dtype}; it must be float32, float16 or bfloat16"
            )
        if scales.ndim < 2 or biases.shape != scales.shape or biases.dtype != scales.dtype:
            raise ValueError(
                f"{name}.scales {scales.shape} {scales.dtype} and biases {biases.shape} "
                f"{biases.dtype} must agree in shape and dtype"
            )
        packed = (*scales.shape[:-1], self.shape[-1] * self.bits // 32)
        if codes.shape != packed:
            raise ValueError(
                f"{name}.w is {codes.shape} but scales {scales.shape} at {self.bits} bits and "
                f"group size {self.group_size} need codes of shape {packed}"
            )


def pack(q: mx.array, bits: int) -> mx.array:
    """Codes `[..., in]` as one little-endian bit stream per row, uint32 `[..., in * bits / 32]`."""
    codes = mx.unflatten(q.astype(mx.uint32), -1, (-1, 32))  # 32 codes fill `bits` words
    words = [mx.zeros(codes.shape[:-1], dtype=mx.uint32) for _ in range(bits)]
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (codes[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).flatten(-2)
