"""Products of activations with dense and quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import mlx.core as mx

from . import metal, native
from .affine import AffineWeight

# Of x, up to which the Metal kernels read each weight once. Above it stock MLX stays until ours
# have been measured on a Mac.
GPU_ROWS = 16


def linear(
    x: mx.array, w: mx.array, *, transpose: bool = True, indices: mx.array | None = None
) -> mx.array:
    """`x @ w.T`, accumulated in float32.

    Args:
        x: Activations `[..., in]` in float32, float16 or bfloat16.
        w: Weights `[out, in]`, or `[experts, out, in]` with `indices`.
        transpose: `False` computes `x @ w` instead.
        indices: uint32 `[rows]`; row `i` of a two-dimensional `x` uses weight `indices[i]`.

    Returns:
        `[..., out]` in the wider dtype of `x` and `w`.
    """
    if ext := native.active():
        out: mx.array = ext.linear(x, w, transpose, indices=indices)
        return out
    if indices is None:
        return x @ (w.swapaxes(-1, -2) if transpose else w)
    dtype = mx.result_type(x, w)
    right = w.swapaxes(-1, -2) if transpose else w
    if native.on_cpu():  # gather_mm exists in float32 only there
        x, right = x.astype(mx.float32), right.astype(mx.float32)
    return mx.gather_mm(x[:, None, :], right, rhs_indices=indices).squeeze(-2).astype(dtype)


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    *,
    indices: mx.array | None = None,
) -> mx.array:
    """`x @ dequantize(w).T` for affine codes, accumulated in float32.

    Args:
        x: Activations `[..., in]` in float32, float16 or bfloat16.
        w: Codes `[out, in * bits / 32]` in uint32, as `mx.quantize` packs them; with `indices`
            `[experts, out, in * bits / 32]`.
        scales, biases: `[out, in / group_size]`; a weight is `scale * code + bias`.
        transpose: `False` computes `x @ dequantize(w)` instead.
        group_size: 32, 64 or 128.
        bits: 2, 3, 4, 5, 6 or 8.
        indices: uint32 `[rows]`; row `i` of a two-dimensional `x` uses weight `indices[i]`.

    Returns:
        `[..., out]` in the wider dtype of `x` and `scales`.
    """
    if ext := _extension(x):
        out: mx.array = ext.quantized_matmul(
            x, w, scales, biases, transpose, group_size, bits, indices=indices
        )
        return out
    if indices is None:
        return mx.quantized_matmul(
            x, w, scales, biases, transpose=transpose, group_size=group_size, bits=bits
        )
    return mx.gather_qmm(
        x[:, None, :],
        w,
        scales,
        biases,
        rhs_indices=indices,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
    ).squeeze(-2)


def mixed_quantized_matmul(x: mx.array, parts: Sequence[AffineWeight]) -> list[mx.array]:
    """`x @ dequantize(w).T` for each of several weights, in one launch.

    The weights may differ in width, group size and rows: queries, keys and values, or gate and up
    projection, each with the bits it deserves.

    Args:
        x: Activations `[..., in]` in float32, float16 or bfloat16.
        parts: Weights `[out_i, in]`, at least one.

    Returns:
        `[..., out_i]` for each part, in the wider dtype of `x` and its scales: what
        `quantized_matmul` gives for it alone, to the bit.
    """
    if ext := _extension(x):
        outs: list[mx.array] = ext.mixed_quantized_matmul(x, [tuple(part) for part in parts])
        return outs
    return [
        quantized_matmul(x, w.codes, w.scales, w.biases, group_size=w.group_size, bits=w.bits)
        for w in parts
    ]


def _extension(x: mx.array) -> ModuleType | None:
    """The extension if it should multiply `x [..., in]` with quantized weights, else None."""
    if native.on_cpu():
        return native.extension
    return metal.proven("quantized_matmul") if x.size <= GPU_ROWS * x.shape[-1] else None
