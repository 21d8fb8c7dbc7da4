"""Products of activations with dense and quantized weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx

from . import metal, native
from .affine import AffineWeight

# Of x, up to which the Metal kernels read each weight once. Above it stock MLX stays until ours
# have been measured on a Mac.
GPU_ROWS = 16
OP = "quantized_matmul"  # the name of all these products to metal.py


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
    if x.ndim == 1:  # the native gradients are of rows
        return linear(x[None], w, transpose=transpose)[0]
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


def gathered_low_rank(x: mx.array, a: mx.array, b: mx.array, indices: mx.array) -> mx.array:
    """`x[i] @ a[s].T @ b[s].T` with s = indices[i]: the low-rank term of each row's own adapter.

    Args:
        x: Activations `[rows, in]` in float32, float16 or bfloat16.
        a: `[slots, rank, in]`.
        b: `[slots, out, rank]`.
        indices: uint32 `[rows]`.

    Returns:
        `[rows, out]` in the widest dtype. On the CPU, with up to 16 rows of a slot, a row does not
        depend on the others, to the bit.
    """
    return linear(linear(x, a, indices=indices), b, indices=indices)


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
    if x.ndim == 1:
        return quantized_matmul(x[None], w, scales, biases, transpose, group_size, bits)[0]

    def native_product(ext: ModuleType) -> mx.array:
        out: mx.array = ext.quantized_matmul(
            x, w, scales, biases, transpose, group_size, bits, indices=indices
        )
        return out

    def stock() -> mx.array:
        weight = w, scales, biases
        how: dict[str, Any] = {"transpose": transpose, "group_size": group_size, "bits": bits}
        if indices is None:
            return mx.quantized_matmul(x, *weight, **how)
        return mx.gather_qmm(x[:, None, :], *weight, rhs_indices=indices, **how).squeeze(-2)

    if ext := native.active():
        return native_product(ext)
    rows = _rows(x)
    if not 0 < rows <= GPU_ROWS:
        return stock()
    kind = "experts" if indices is not None else "one" if transpose else "not transposed"
    launch = kind, x.dtype, rows, (scales.dtype, group_size, bits)
    return metal.run(OP, launch, native_product, stock)


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

    def native_products(ext: ModuleType) -> list[mx.array]:
        outs: list[mx.array] = ext.mixed_quantized_matmul(x, [tuple(part) for part in parts])
        return outs

    def one_by_one() -> list[mx.array]:
        return [
            quantized_matmul(x, w.codes, w.scales, w.biases, group_size=w.group_size, bits=w.bits)
            for w in parts
        ]

    if native.on_cpu():
        return native_products(native.extension) if native.extension else one_by_one()
    rows = _rows(x)
    if not 0 < rows <= GPU_ROWS:
        return one_by_one()
    return metal.run(OP, several(x.dtype, rows, parts), native_products, one_by_one)


def single(x: mx.Dtype, rows: int, part: AffineWeight) -> tuple[Hashable, ...]:
    """The launch of a product on a Metal GPU, for `metal.proven`."""
    return "one", x, rows, (part.scales.dtype, part.group_size, part.bits)


def several(x: mx.Dtype, rows: int, parts: Sequence[AffineWeight]) -> tuple[Hashable, ...]:
    """The same of `mixed_quantized_matmul`."""
    return "several", x, rows, *((w.scales.dtype, w.group_size, w.bits) for w in parts)


def _rows(x: mx.array) -> int:
    return x.size // max(x.shape[-1], 1) if x.ndim else 0
