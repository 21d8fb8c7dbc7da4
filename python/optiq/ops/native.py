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

MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]


def _mlx_version() -> int:
    """The loaded MLX's version as its headers number it: 100000 major + 1000 minor + patch."""
    major, minor, patch = (int(part) for part in MLX_VERSION.split(".")[:3])
    return 100_000 * major + 1_000 * minor + patch


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("OPTIQ_NATIVE") == "0":
        return None, "switched off by OPTIQ_NATIVE=0"
    try:
        extension = importlib.import_module("optiq._ext")
    except (ImportError, OSError) as error:
        return None, f"the native extension does not load ({error}); reinstall optiq-mlx"
    built_for = extension.mlx_version
    if built_for != _mlx_version():
        number = f"{built_for // 100_000}.{built_for // 1_000 % 100}.{built_for % 1_000}"
        return None, (
            f"the native extension was built for mlx {number} but mlx {MLX_VERSION} is loaded; "
            f"pip install mlx=={number}"
        )
    return extension, ""


extension, reason = _load()
if extension is None and os.environ.get("OPTIQ_NATIVE") != "0":
    warnings.warn(f"optiq runs on pure MLX, slower: {reason}", RuntimeWarning, stacklevel=2)

_gpu_possible = mx.metal.is_available() or mx.cuda.is_available()


def on_cpu() -> bool:
    """Whether work goes to the CPU by default."""
    return not _gpu_possible or mx.default_device().type == mx.DeviceType.cpu


def active() -> ModuleType | None:
    """The extension if it should run the next operation, else None."""
    return extension if extension is not None and on_cpu() else None
