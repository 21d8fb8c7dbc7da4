"""Products of activations with dense and quantized weights."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

from . import metal, native
from .affine import AffineWeight
from .contest import Sample

# Of x, up to which the Metal kernels read each weight once. For more rows there are others,
# compiled for up to 32 rows and for more.
GPU_ROWS = 16
FEW, MANY = 32, 64
TIMED_ROWS = 256  # at most
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
    sorted_indices: bool = False,
    exact: bool = True,
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
        sorted_indices: The indices ascend, so that a GPU may read each weight once.
        exact: `False` lets the CPU read an `x` of float32 as 16-bit fixed point, each group by its
            largest value. That is faster, and what it does with 16-bit activations in any case.

    Returns:
        `[..., out]` in the wider dtype of `x` and `scales`.
    """
    if x.ndim == 1:
        x = x[None]
        return quantized_matmul(x, w, scales, biases, transpose, group_size, bits, exact=exact)[0]

    def native_product(ext: ModuleType, x: mx.array = x) -> mx.array:
        out: mx.array = ext.quantized_matmul(
            x, w, scales, biases, transpose, group_size, bits, indices=indices, exact=exact
        )
        return out

    def stock(x: mx.array = x) -> mx.array:
        weight = w, scales, biases
        how: dict[str, Any] = {"transpose": transpose, "group_size": group_size, "bits": bits}
        if indices is None:
            return mx.quantized_matmul(x, *weight, **how)
        how["sorted_indices"] = sorted_indices
        return mx.gather_qmm(x[:, None, :], *weight, rhs_indices=indices, **how).squeeze(-2)

    if ext := native.active():
        return native_product(ext)
    rows = _rows(x)
    if transpose and indices is not None and sorted_indices and rows > GPU_ROWS and not _traced(x):
        ordered = _Sorted(AffineWeight(w, scales, biases, group_size, bits))
        return metal.run(
            OP,
            ordered.launch(x.dtype, rows),
            lambda ext: ordered.ours(ext, x, indices),
            stock,
            lambda: ordered.refusal(x.dtype, rows),
        )
    plain = transpose and indices is None
    if not rows or (rows > GPU_ROWS and (not plain or _traced(x))):
        return stock()
    kind = "experts" if indices is not None else "one" if transpose else "not transposed"
    launch = kind, x.dtype, _compiled(rows), (scales.dtype, group_size, bits)
    reads = (w, scales, biases) if indices is None else (w, scales, biases, indices)
    sample = _sample(rows, x.shape[-1], [scales.shape[:-1]], reads)
    refused = partial(metal.refusal, OP, launch, x.dtype, native_product, stock, sample)
    return metal.run(OP, launch, native_product, stock, refused)


def mixed_quantized_matmul(
    x: mx.array, parts: Sequence[AffineWeight], *, exact: bool = True
) -> list[mx.array]:
    """`x @ dequantize(w).T` for each of several weights, in one launch.

    The weights may differ in width, group size and rows: queries, keys and values, or gate and up
    projection, each with the bits it deserves.

    Args:
        x: Activations `[..., in]` in float32, float16 or bfloat16.
        parts: Weights `[out_i, in]`, at least one.
        exact: As in `quantized_matmul`.

    Returns:
        `[..., out_i]` for each part, in the wider dtype of `x` and its scales: what
        `quantized_matmul` gives for it alone, to the bit.
    """

    together = _Together(parts, exact)
    if native.on_cpu():
        ext = native.extension
        return together.ours(ext, x) if ext else together.one_by_one(x)
    rows = _rows(x)
    if not rows or (rows > GPU_ROWS and _traced(x)):
        return together.one_by_one(x)
    return metal.run(
        OP,
        several(x.dtype, rows, parts),
        lambda ext: together.ours(ext, x),
        lambda: together.one_by_one(x),
        lambda: together.refusal(x.dtype, rows),
    )


class _Together(NamedTuple):
    """The products of one x with several weights."""

    parts: Sequence[AffineWeight]
    exact: bool = True

    def ours(self, ext: ModuleType, x: mx.array) -> list[mx.array]:
        parts = [tuple(part) for part in self.parts]
        out: list[mx.array] = ext.mixed_quantized_matmul(x, parts, exact=self.exact)
        return out

    def one_by_one(self, x: mx.array) -> list[mx.array]:
        return [quantized_matmul(x, *w[:3], True, *w[3:], exact=self.exact) for w in self.parts]

    def refusal(self, dtype: mx.Dtype, rows: int) -> str:
        inner = self.parts[0].scales.shape[-1] * self.parts[0].group_size
        outs = [w.scales.shape[:-1] for w in self.parts]
        sample = _sample(rows, inner, outs, [a for w in self.parts for a in w[:3]])
        launch = several(dtype, rows, self.parts)
        return metal.refusal(OP, launch, dtype, self.ours, self.one_by_one, sample)


class _Sorted(NamedTuple):
    """The products of rows with the experts of a weight, which lie in ascending order."""

    weight: AffineWeight

    def ours(self, ext: ModuleType, x: mx.array, indices: mx.array | None = None) -> mx.array:
        """Without indices all experts get as many rows."""
        out: mx.array = ext.quantized_matmul(
            x, *self.weight[:3], True, *self.weight[3:],
            indices=self._even(x) if indices is None else indices, sorted_indices=True,
        )  # fmt: skip
        return out

    def stock(self, x: mx.array) -> mx.array:
        size, bits = self.weight[3:]
        return mx.gather_qmm(
            x[:, None, :], *self.weight[:3], rhs_indices=self._even(x), group_size=size, bits=bits,
            sorted_indices=True,
        ).squeeze(-2)  # fmt: skip

    def launch(self, x: mx.Dtype, rows: int) -> tuple[Hashable, ...]:
        """Kernels have tiles of as many rows as an expert has on average."""
        w = self.weight
        tile = max(GPU_ROWS, self._each(rows))
        return "sorted experts", x, tile, (w.scales.dtype, w.group_size, w.bits)

    def refusal(self, dtype: mx.Dtype, rows: int) -> str:
        """Timed once for each power of two of rows that an expert has."""
        experts, out, groups = self.weight.scales.shape
        rows, inner = self._each(rows) * experts, groups * self.weight.group_size
        sample = Sample(f"{rows} x {inner} x {experts}x{out}", (rows, inner), self.weight[:3])
        launch = self.launch(dtype, rows)
        return metal.refusal(OP, launch, dtype, self.ours, self.stock, sample)

    def _each(self, rows: int) -> int:
        """Of an expert on average, as a power of two, and no more than a tile has."""
        each = -(-rows // self.weight.scales.shape[0])
        return min(1 << (each - 1).bit_length(), MANY)

    def _even(self, x: mx.array) -> mx.array:
        rows = len(x)
        return (mx.arange(rows) * self.weight.scales.shape[0] // rows).astype(mx.uint32)


def refusal_together(dtype: mx.Dtype, parts: Sequence[AffineWeight]) -> str:
    """Why a Metal GPU has no launch for these products of one row, or nothing."""
    return _Together(parts).refusal(dtype, 1)


def refusal(dtype: mx.Dtype, weight: AffineWeight) -> str:
    """Why a Metal GPU leaves the product of one row with this weight to stock MLX, or nothing."""

    def native_product(ext: ModuleType, x: mx.array) -> mx.array:
        out: mx.array = ext.quantized_matmul(x, *weight[:3], True, *weight[3:])
        return out

    def stock(x: mx.array) -> mx.array:
        size, bits = weight[3:]
        return mx.quantized_matmul(x, *weight[:3], group_size=size, bits=bits)

    inner = weight.scales.shape[-1] * weight.group_size
    sample = _sample(1, inner, [weight.scales.shape[:-1]], weight[:3])
    return metal.refusal(OP, single(dtype, 1, weight), dtype, native_product, stock, sample)


def refusal_sorted(dtype: mx.Dtype, weight: AffineWeight) -> str:
    """Why a Metal GPU leaves the products of many rows with these experts to stock MLX, or
    nothing."""
    return _Sorted(weight).refusal(dtype, FEW * weight.scales.shape[0])


def single(x: mx.Dtype, rows: int, part: AffineWeight) -> tuple[Hashable, ...]:
    """The launch of a product on a Metal GPU, for `metal.proven`."""
    return "one", x, _compiled(rows), (part.scales.dtype, part.group_size, part.bits)


def several(x: mx.Dtype, rows: int, parts: Sequence[AffineWeight]) -> tuple[Hashable, ...]:
    """The same of `mixed_quantized_matmul`."""
    return "several", x, _compiled(rows), *((w.scales.dtype, w.group_size, w.bits) for w in parts)


def _rows(x: mx.array) -> int:
    return x.size // max(x.shape[-1], 1) if x.ndim else 0


def _compiled(rows: int) -> int:
    """The rows that tell one kernel from another (csrc/launch/quantized_matmul.cpp)."""
    return rows if rows <= GPU_ROWS else FEW if rows <= FEW else MANY


def _sample(
    rows: int, inner: int, outs: Sequence[Sequence[int]], reads: Sequence[mx.array]
) -> Sample:
    """Many rows are timed once for each power of two."""
    if rows > GPU_ROWS:
        rows = min(1 << (rows - 1).bit_length(), TIMED_ROWS)
    name = f"{rows} x {inner} x {' + '.join('x'.join(map(str, out)) for out in outs)}"
    return Sample(name, (rows, inner), tuple(reads))


def _traced(x: mx.array) -> bool:
    return native.extension is not None and bool(native.extension.traced(x))
