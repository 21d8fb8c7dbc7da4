"""Runs each op that has Metal kernels on a case: a small one is the trial of a launch (metal.py),
all of them `optiq doctor --selftest`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import DENSE, Format
from .affine import AffineWeight
from .attention_cases import Attention, Records
from .cases import DTYPES, Pair, Product, Rounding, Terms
from .layer_cases import LayerCase

WIDE = 64 * 256  # outputs: 256 tiles of 64, as many as `narrow_from` can ask for (docs/kernels.md)

# Each of these runs a case on the default device and returns the largest error as a part of its
# bound. With `cpu`, the bound is that of the CPU's kernels, which round x to fixed point and
# compute the logits that matter in double precision. What may come with strides in a model does so
# here: the kernel that copies it is also tried.


def strided(a: mx.array) -> mx.array:
    """The same values, every other one in memory."""
    return mx.repeat(a, 2, axis=-1)[..., ::2]


def _floats(x: mx.array, exact: bool = True) -> bool:
    """Whether the CPU does not read x as 16-bit fixed point."""
    return exact and x.dtype == mx.float32


def multiply(ext: Any, case: Product, transpose: bool = True, cpu: bool = False) -> float:
    x = strided(case.activations(None if transpose else case.out))
    weight = *case.quantized(), transpose, case.group_size, case.bits
    parts = []
    for exact in (True, False) if cpu else (True,):
        y = ext.quantized_matmul(x, *weight, exact=exact)
        parts.append(case.part(y, transpose, fixed=cpu and transpose and not _floats(x, exact)))
    return float(np.max(parts))


def multiply_mixed(ext: Any, case: Product, cpu: bool = False) -> float:
    """Beside a weight of another height."""
    return multiply_several(ext, [case, replace(case, out=case.out // 2 + 1)], cpu)


def multiply_several(ext: Any, cases: Sequence[Product], cpu: bool = False) -> float:
    """Weights that share the x of the first."""
    x = strided(cases[0].activations())
    ys = ext.mixed_quantized_matmul(x, [tuple(c.affine()) for c in cases])
    fixed = cpu and not _floats(x)
    parts = [c.part(y, fixed=fixed) for c, y in zip(cases, ys, strict=True)]
    return float(np.max(parts))  # NaN if one is, unlike max()


def multiply_experts(
    ext: Any, case: Product, cpu: bool = False, sorted_indices: bool = False
) -> float:
    """Two of three experts in turn, or one after the other; the first of them twice the weight."""
    codes, scales, biases = case.quantized()
    stacked = [mx.stack([codes] * 3), *(mx.stack([2 * a, a, a]) for a in (scales, biases))]
    which = 2 - 2 * (mx.arange(case.rows, dtype=mx.uint32) % 2)
    which = mx.sort(which) if sorted_indices else which
    y = ext.quantized_matmul(
        strided(case.activations()), *stacked, True, case.group_size, case.bits,
        indices=which, sorted_indices=sorted_indices,
    )  # fmt: skip
    y = mx.where(which[:, None] == 0, y / 2, y)
    return case.part(y, fixed=cpu and not _floats(y))


def round_minmax(ext: Any, case: Rounding) -> float:
    """Equal to MLX's on the same device to the bit, or infinitely far."""
    w, _ = case.inputs()
    got = ext.quantize(strided(w), None, case.group_size, case.bits)
    stock = mx.quantize(w, case.group_size, case.bits)
    equal = all(mx.array_equal(a, b).item() for a, b in zip(got, stock, strict=True))
    return 0.0 if equal else math.inf


def round_by_search(ext: Any, case: Rounding) -> float:
    return case.part(ext.quantize(*case.inputs(), case.group_size, case.bits))


def compare(ext: Any, case: Pair, cpu: bool = False) -> float:
    h_p, w_p, h_q, w_q = case.sides()
    heads = [list(w[:3]) if isinstance(w, AffineWeight) else [w] for w in (w_p, w_q)]
    formats = [w[3:] if isinstance(w, AffineWeight) else (0, 0) for w in (w_p, w_q)]
    got = ext.kl_divergence(h_p, heads[0], h_q, heads[1], *formats, case.soft_cap or 0.0)
    return case.part(got, exact=cpu)


def store(ext: Any, case: Records) -> float:
    return case.part(ext.quantize_kv(strided(case.vectors()), case.group_size, case.bits))


def attend(ext: Any, case: Attention) -> float:
    """A padded batch over records."""
    formats = [(0, 0) if f == DENSE else (f.group_size, f.bits) for f in (case.k, case.v)]
    given = case.arguments()
    options = {"value_dim": case.value_dim} if case.value_dim else {}
    return case.part(
        ext.quantized_attention(
            strided(case.queries()), *case.stored(), *formats, given["scale"], "causal",
            starts=given["starts"], softcap=case.softcap, recent=case.recent(), **options,
        )
    )  # fmt: skip


def add_terms(ext: Any, case: Terms) -> float:
    x, a, b, slots = case.inputs()
    return case.part(ext.gathered_low_rank(strided(x), a, b, slots))


def decode(ext: Any, case: LayerCase) -> float:
    handle = case.layer.native(ext, case.h.dtype, case.formats)
    return case.part(*ext.decode_layer(handle, case.h, *case.caches, case.place))


# What follows is the trial of a launch, by op: its arguments are what kernels are compiled for.
# Only gross faults show here, in milliseconds once the kernels are compiled.


def _named(dtype: mx.Dtype) -> str:
    return next(name for name, d in DTYPES.items() if d == dtype)


def _products(
    ext: Any, how: str, x: mx.Dtype, rows: int, *weights: tuple[mx.Dtype, int, int]
) -> list[float]:
    """Each weight: dtype of its scales, group size, bits. Some columns are a lane's second ones."""
    if how == "sorted experts":  # rows of a tile, of which each of two has one and a bit
        ((scales, group_size, bits),) = weights
        case = Product(3 * rows - 4, 72, 256, bits, group_size, _named(x), _named(scales))
        return [multiply_experts(ext, case, sorted_indices=True)]
    many = rows > 16
    cases = [
        Product(rows - 3 * many, 64 + 8 * i, 1152, bits, group_size, _named(x), _named(scales))
        for i, (scales, group_size, bits) in enumerate(weights)
    ]
    if how == "experts":
        return [multiply_experts(ext, cases[0])]
    if how == "not transposed":
        return [multiply(ext, replace(cases[0], out=128), transpose=False)]
    # For many rows sums are split where a weight is small and has columns enough, and tiles are
    # wider where it is wide.
    short = [replace(c, inner=256) for c in cases] if many else []
    wide = [replace(c, out=WIDE) for c in short]
    if how == "several":
        mixed = [replace(c, inner=512) for c in (*wide[:1], *short[1:])]
        return [multiply_several(ext, some) for some in (cases, short, wide, mixed) if some]
    return [multiply(ext, case) for case in (*cases, *short, *wide)]


def _roundings(ext: Any, how: str, w: mx.Dtype, group_size: int, bits: int) -> list[float]:
    case = Rounding(bits, group_size, _named(w))
    return [round_by_search(ext, case) if how == "search" else round_minmax(ext, case)]


def _comparisons(
    ext: Any, p: tuple[mx.Dtype, int, int], q: tuple[mx.Dtype, int, int]
) -> list[float]:
    """Each head: dtype of its weight or scales, group size, bits."""
    case = Pair(
        35, 300, 128, 128, bits_p=p[2], bits_q=q[2], group_size=p[1], group_q=q[1],
        dtype=_named(p[0]), dtype_q=_named(q[0]),
    )  # fmt: skip
    return [compare(ext, case)]


def _records(ext: Any, x: mx.Dtype, dim: int, fmt: Format) -> list[float]:
    return [store(ext, Records(fmt.bits, fmt.group_size, dim, _named(x)))]


def _attentions(
    ext: Any, q: mx.Dtype, dim: int, value_dim: int, k: Format, v: Format, tile: int, *how: str
) -> list[float]:
    """Few keys and, but for many queries (tile 0), so many that threadgroups share them.

    Up to a tile of 4, that many query heads share a key head; else three do.
    """
    rows = {8: 2, 16: 5, 32: 11, 0: 40}.get(tile, 1)
    case = Attention(
        rows, 90, dim, k, v, group=tile if 0 < tile <= 4 else 3, mask="starts", padding=20,
        dtype=_named(q), value_dim=value_dim, softcap=20.0 if "masked" in how else 0.0,
        exact=7 if "exact" in how else 0,
    )  # fmt: skip
    long = [replace(case, keys=1100, padding=70)] if tile else []
    return [attend(ext, c) for c in [case, *long]]


def _low_rank(ext: Any, dtype: mx.Dtype) -> list[float]:
    """Slots in disorder, and more outputs than a threadgroup has threads."""
    return [add_terms(ext, Terms(5, 130, 300, 16, _named(dtype)))]


def _decoder_layers(
    ext: Any, x: mx.Dtype, scales: mx.Dtype, batch: int, dim: int, shared: int, k: Format,
    v: Format, post: bool, *weights: Sequence[Format],
) -> list[float]:  # fmt: skip
    """Few keys, and so many that threadgroups share them. Some columns are a lane's second ones."""
    qkv, (out,), gate_up, (down,) = weights
    kv_heads = 128 // math.gcd(128, shared * dim)  # whole groups of the output's columns
    case = LayerCase(
        "", tuple(qkv), out, tuple(gate_up), down, _named(x), _named(scales), batch,
        formats=(k, v), width=384, hidden=384, dim=dim, heads=shared * kv_heads,
        kv_heads=kv_heads, head_norms=True, post_norms=post,
    )  # fmt: skip
    return [decode(ext, c) for c in (case, replace(case, keys=1100))]


TRIALS: dict[str, Callable[..., list[float]]] = {
    "quantized_matmul": _products,
    "quantize": _roundings,
    "kl_divergence": _comparisons,
    "quantize_kv": _records,
    "quantized_attention": _attentions,
    "gathered_low_rank": _low_rank,
    "decode_layer": _decoder_layers,
}


def passes(ext: Any, op: str, launch: tuple[Hashable, ...]) -> bool:
    return all(part <= 1 for part in TRIALS[op](ext, *launch))
