"""Loads the native extension where it fits the loaded MLX; otherwise says why not.

MLX's C++ interface changes in every release, so the extension works with exactly the MLX it was
built for. With another one, optiq warns once and runs the same maths on `mx.*`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import mlx.core as mx

from ..errors import UsageError

# The release that pyproject.toml pins for the build.
BUILT_FOR = "0.32.4"


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
        module = importlib.import_module("optiq._ext")
    except ImportError as error:
        return None, f"the native part does not load ({error}); reinstall optiq-mlx"
    try:
        module.isa()  # the choice of kernels, which OPTIQ_ISA may make impossible
    except ValueError as error:
        raise UsageError(str(error)) from None
    return module, ""


extension, reason = _load()
if extension is None and os.environ.get("OPTIQ_NATIVE") != "0":
    warnings.warn(f"optiq runs on pure MLX, slower: {reason}", RuntimeWarning, stacklevel=2)

_GPU = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else ""


def device() -> str:
    """Where work goes by default: "cpu", "metal" or "cuda"."""
    return _GPU if _GPU and mx.default_device().type == mx.DeviceType.gpu else "cpu"


def on_cpu() -> bool:
    return device() == "cpu"


def active() -> ModuleType | None:
    """The extension if it should run the next operation, else None. On a GPU never."""
    return extension if extension is not None and on_cpu() else None
