"""mx.quantize on a GPU: MLX's own kernel, on the emulator. It is not what MLX does on a CPU."""

from __future__ import annotations

import functools
from itertools import product

import mlx.core as mx
import numpy as np

from optiq.formats import AFFINE_BITS, AFFINE_GROUPS

from .emulator import Module, Out
from .mlx_headers import DTYPES, INCLUDE, QUANTIZED, buffer_dtype, to_buffer


@functools.cache
def _module() -> Module:
    kernels = {
        f"{kind}_{group}_{bits}": f"affine_quantize<{kind}, {group}, {bits}>"
        for kind, group, bits in product(DTYPES, AFFINE_GROUPS, AFFINE_BITS)
    }
    return Module(source=QUANTIZED, kernels=kernels, include=[INCLUDE])


def gpu_quantize(w: mx.array, group_size: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases."""
    kind = next(kind for kind, (dtype, _) in DTYPES.items() if dtype == w.dtype)
    groups = (*w.shape[:-1], w.shape[-1] // group_size)
    parameters = Out(groups, buffer_dtype(kind)), Out(groups, buffer_dtype(kind))
    codes = Out((*w.shape[:-1], w.shape[-1] * bits // 8), np.uint8)
    (packed, *rest), _ = _module()(
        f"{kind}_{group_size}_{bits}",
        dict(enumerate((to_buffer(w), codes, *parameters))),
        grid=(w.size * 32 // group_size, 1, 1),  # a simdgroup quantizes a group
        threads=(32, 1, 1),
        dispatch_threads=True,
    )
    scales, biases = (mx.array(a).view(w.dtype) for a in rest)
    return mx.array(packed).view(mx.uint32), scales, biases
