"""Loads the native extension where it fits the loaded MLX; otherwise says why not.

MLX's C++ interface changes in every release, so the extension works with exactly the MLX it was
built for. With another one, optiq warns once and runs the same maths on `mx.*`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import mlx.core as mx

# The release that pyproject.toml pins for the build.
BUILT_FOR = "0.32.4"

GPU_ROWS = 16


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("OPTIQ_NATIVE") == "0":
        return None, "switched off by OPTIQ_NATIVE=0"
    loaded: str = mx.__version__  # type: ignore[attr-defined]
    if loaded != BUILT_FOR:  # asked first: importing the extension would fail on a missing symbol
        return None, (
            f"its native part is built for mlx {BUILT_FOR}, but mlx {loaded} is loaded; "
            f"pip install mlx=={BUILT_FOR}"
        )
    try:
        return importlib.import_module("optiq._ext"), ""
    except ImportError as error:
        return None, f"the native part does not load ({error}); reinstall optiq-mlx"


extension, reason = _load()
if extension is None and os.environ.get("OPTIQ_NATIVE") != "0":
    warnings.warn(f"optiq runs on pure MLX, slower: {reason}", RuntimeWarning, stacklevel=2)

_gpu_possible = mx.metal.is_available() or mx.cuda.is_available()


def on_cpu() -> bool:
    """Whether work goes to the CPU by default."""
    return not _gpu_possible or mx.default_device().type == mx.DeviceType.cpu


def active() -> ModuleType | None:
    """The extension if it should run the next operation, else None. On a GPU never."""
    return extension if extension is not None and on_cpu() else None


def for_product(x: mx.array) -> ModuleType | None:
    """The extension if it should multiply `x [..., in]` with quantized weights, else None.

    On a GPU that is for up to 16 rows, where each weight is read once for all of them. For more
    rows stock MLX stays until our kernels have been measured on a Mac.
    """
    if on_cpu():
        return extension
    if x.size > GPU_ROWS * x.shape[-1] or not gpu_works():
        return None
    return extension


@cache
def gpu_works() -> bool:
    """Whether the Metal kernels run here and agree with stock MLX on a small product.

    They are tested on emulated threads and have never run on a Mac, so the first use in a process
    tries them. OPTIQ_METAL=0 leaves them alone, without a trial.
    """
    if extension is None or not mx.metal.is_available() or os.environ.get("OPTIQ_METAL") == "0":
        return False
    try:
        x = mx.random.normal((2, 256), key=mx.random.key(0))
        weight = mx.quantize(mx.random.normal((64, 256), key=mx.random.key(1)), 64, 4)
        got = extension.quantized_matmul(x, *weight, True, 64, 4, stream=mx.gpu)
        expected = mx.quantized_matmul(x, *weight, stream=mx.gpu)
        if mx.allclose(got, expected, rtol=1e-3, atol=1e-3).item():
            return True
        why = "they do not agree with stock MLX"
    except (RuntimeError, ValueError) as error:
        why = f"they do not run ({error})"
    warnings.warn(
        f"optiq's Metal kernels are left alone: {why}; please report what "
        "`optiq doctor --selftest` prints",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
