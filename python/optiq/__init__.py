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
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .cards.card import card as card
    from .cards.info import info as info
    from .cards.upload import upload as upload
    from .doctor.guide import guide as guide
    from .errors import OptiqError as OptiqError
    from .evals.runner import evaluate as evaluate
    from .nn.accelerate import accelerate as accelerate
    from .planning.files import plan as plan
    from .planning.plan import Plan as Plan
    from .planning.scores import Scores as Scores
    from .quality.compare import compare as compare
    from .quantize.convert import Result as Result
    from .quantize.convert import convert as convert
    from .quantize.frontier import frontier as frontier
    from .quantize.kv.plan import kv_plan as kv_plan
    from .quantize.score import sensitivity as sensitivity
    from .runtime.generate import generate as generate
    from .runtime.loading import load as load
    from .sandbox import Sandbox as Sandbox

blas.provide()

# What is exported, and where it lies.
_EXPORTS = {
    "OptiqError": "errors",
    "Plan": "planning.plan",
    "Result": "quantize.convert",
    "Sandbox": "sandbox",
    "Scores": "planning.scores",
    "accelerate": "nn.accelerate",
    "card": "cards.card",
    "compare": "quality.compare",
    "convert": "quantize.convert",
    "evaluate": "evals.runner",
    "frontier": "quantize.frontier",
    "generate": "runtime.generate",
    "guide": "doctor.guide",
    "info": "cards.info",
    "kv_plan": "quantize.kv.plan",
    "load": "runtime.loading",
    "plan": "planning.files",
    "sensitivity": "quantize.score",
    "upload": "cards.upload",
}
_ROOMS = ("lora", "nn", "ops", "serve")  # exported whole; serve can be called

__all__ = [*_EXPORTS, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"optiq.{_EXPORTS[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"optiq.{name}")
    raise AttributeError(f"module 'optiq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if next(Path(__file__).parent.parent.glob("mlx_optiq-*.dist-info"), None):
    warnings.warn(
        "mlx-optiq is installed beside optiq-mlx and uses the same import name, so the files of "
        "one overwrite the other's; pip uninstall mlx-optiq, then pip install --force-reinstall "
        "optiq-mlx",
        RuntimeWarning,
        stacklevel=2,
    )
