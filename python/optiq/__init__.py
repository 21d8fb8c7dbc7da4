"""optiq: mixed-precision quantization of language models for MLX.

    result = optiq.convert("Qwen/Qwen3-0.6B", "out")
    model, tokenizer = optiq.load("out")

Everything is imported on first use, so that `import optiq` and `optiq --help` are quick. On
Linux, import optiq before mlx: only then does MLX itself get a fast matmul (see `optiq.blas`).
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import blas

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .nn.accelerate import accelerate as accelerate
    from .quantize.convert import Result as Result
    from .quantize.convert import convert as convert
    from .runtime.loading import load as load

blas.provide()

_LAZY = {
    "accelerate": ("optiq.nn", "accelerate"),
    "convert": ("optiq.conversion", "convert"),
    "Result": ("optiq.conversion", "Result"),
    "load": ("optiq.runtime", "load"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    if name in ("ops", "nn"):
        return importlib.import_module(f"optiq.{name}")
    raise AttributeError(f"module 'optiq' has no attribute {name!r}")


if next(Path(__file__).parent.parent.glob("mlx_optiq-*.dist-info"), None):
    warnings.warn(
        "mlx-optiq is installed beside optiq-mlx and uses the same import name, so the files of "
        "one overwrite the other's; pip uninstall mlx-optiq, then pip install --force-reinstall "
        "optiq-mlx",
        RuntimeWarning,
        stacklevel=2,
    )
