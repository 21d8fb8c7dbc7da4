"""Runs each op that has Metal kernels on a case: a few small ones are its trial (metal.py), all of
them `optiq doctor --selftest`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..formats import Format
from .affine import AffineWeight
from .attention_cases import Attention, Records
from .cases import Pair, Product, Rounding

# Each of these runs a case on the default device and returns the largest error as a part of its
# bound. With `cpu`, the bound is that of the CPU's kernels, which round x to fixed point and
# compute the logits that matter in double precision.


def multiply(ext: Any, case: Product, transpose: bool = True, cpu: bool = False) -> float:
    x = case.activations(None if transpose else case.out)
    y = ext.quantized_matmul(x, *case.quantized(), transpose, case.group_size, case.bits)
    return case.part(y, transpose, fixed=cpu and transpose)


def multiply_mixed(ext: Any, case: Product, cpu: bool = False) -> float:
    """Beside a weight of another height."""
    both = [case, replace(case, out=case.out // 2 + 1)]
    ys = ext.mixed_quantized_matmul(case.activations(), [tuple(c.affine()) for c in both])
    parts = [c.part(y, fixed=cpu) for c, y in zip(both, ys, strict=True)]
    return float(np.max(parts))  # NaN if one is, unlike max()


def multiply_experts(ext: Any, case: Product, cpu: bool = False) -> float:
    """Two experts in turn, the first of them twice the weight."""
    codes, scales, biases = case.quantized()
    stacked = [mx.stack([codes, codes]), *(mx.stack([2 * a, a]) for a in (scales, biases))]
    which = 1 - mx.arange(case.rows, dtype=mx.uint32) % 2
    y = ext.quantized_matmul(
        case.activations(), *stacked, True, case.group_size, case.bits, indices=which
    )
    return case.part(mx.where(which[:, None] == 0, y / 2, y), fixed=cpu)


def round_minmax(ext: Any, case: Rounding) -> float:
    """Equal to MLX's on the same device to the bit, or infinitely far."""
    w, _ = case.inputs()
    got = ext.quantize(w, None, case.group_size, case.bits)
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
    return case.part(ext.quantize_kv(case.vectors(), case.group_size, case.bits))


def attend(ext: Any, case: Attention) -> float:
    """A padded batch over records."""
    formats = [(fmt.group_size, fmt.bits) for fmt in (case.k, case.v)]
    given = case.arguments()
    return case.part(
        ext.quantized_attention(
            case.queries(), *case.stored(), *formats, given["scale"], "causal",
            starts=given["starts"],
        )
    )  # fmt: skip


def _split(rows: int) -> Attention:
    """Attention over so many keys that two threadgroups share them."""
    k, v = Format("affine", 8, 64), Format("affine", 4, 32)
    return Attention(rows, 1100, 64, k, v, group=3, mask="starts", padding=70)


# Only gross faults show here, within a second.
TRIALS: dict[str, tuple[Callable[[Any], float], ...]] = {
    "quantized_matmul": (
        lambda ext: multiply(ext, Product(1, 64, 256, 4, dtype="f16")),
        lambda ext: multiply(ext, Product(16, 64, 256, 4, dtype="bf16")),
        lambda ext: multiply(ext, Product(2, 64, 256, 3), transpose=False),
        lambda ext: multiply_mixed(ext, Product(2, 64, 256, 3)),
        lambda ext: multiply_experts(ext, Product(2, 64, 256, 3)),
    ),
    "quantize": (
        lambda ext: round_minmax(ext, Rounding(6, 64, "f16")),
        lambda ext: round_by_search(ext, Rounding(6, 64, "f16")),
    ),
    "kl_divergence": (
        lambda ext: compare(ext, Pair(35, 300, 64, 64, bits_q=4, group_size=64, dtype="f16")),
    ),
    "quantize_kv": (lambda ext: store(ext, Records(5, 32, 80, "f16")),),
    "quantized_attention": (  # a decode step, and a prefill
        lambda ext: attend(ext, _split(1)),
        lambda ext: attend(ext, _split(40)),
    ),
}


def passes(op: str, ext: Any) -> bool:
    return all(trial(ext) <= 1 for trial in TRIALS[op])
