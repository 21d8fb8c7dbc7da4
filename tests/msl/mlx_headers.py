"""MLX's own kernels, from the headers in its wheel, as sources for the emulator."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

INCLUDE = Path(mx.__file__).parent / "include"
_KERNELS = "mlx/backend/metal/kernels"


def source(*headers: str) -> str:
    """A source that includes these headers, named relative to MLX's folder of kernels."""
    lines = ["#include <metal_stdlib>", "#include <metal_simdgroup>", "using namespace metal;"]
    lines += [f'#include "{_KERNELS}/{header}"' for header in ("utils.h", *headers)]
    return "\n".join(lines) + "\n"


QUANTIZED = source("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
SDPA_VECTOR = source("sdpa_vector.h")
ATTENTION = source("steel/attn/kernels/steel_attention.h")

# name in Metal: (MLX's dtype, unit roundoff)
DTYPES = {
    "float": (mx.float32, 2.0**-24),
    "half": (mx.float16, 2.0**-11),
    "bfloat": (mx.bfloat16, 2.0**-8),
}


def to_buffer(array: mx.array) -> np.ndarray:
    """NumPy view for the emulator; bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def buffer_dtype(kind: str) -> np.dtype:
    return np.dtype({"float": "f4", "half": "f2", "bfloat": "u2"}[kind])


def to_float64(buffer: np.ndarray) -> np.ndarray:
    """Values of what `to_buffer` gave, or of a kernel's output in the same form."""
    if buffer.dtype == np.uint16:
        buffer = (buffer.astype(np.uint32) << 16).view(np.float32)
    return buffer.astype(np.float64)


def random(kind: str, *shape: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)
    return mx.array(values).astype(DTYPES[kind][0])
