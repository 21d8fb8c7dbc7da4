"""The packages of the extra `evals`; only the kinds of instruction that need one ask for it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ...errors import EvalError


def require(package: str) -> ModuleType:
    """The package, imported.

    Raises:
        EvalError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise EvalError(
            f"IFEval: {package} is not installed; pip install 'optiq-mlx[evals]'"
        ) from None
