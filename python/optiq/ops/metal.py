"""Decides whether a GPU may use our Metal kernels for an op.

They are tested on emulated threads and have never run on a Mac, so the first use of an op in a
process tries a few small cases.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

from . import native


def proven(op: str) -> ModuleType | None:
    """The extension on a Metal GPU where its kernels for `op` pass their trial, else None.

    OPTIQ_METAL=0 leaves them alone, without a trial.
    """
    extension = native.extension
    if extension is None or native.device() != "metal" or os.environ.get("OPTIQ_METAL") == "0":
        return None
    return extension if _tried(op, extension) else None


@cache
def _tried(op: str, extension: ModuleType) -> bool:
    """Whether it passes; otherwise warns why not, once."""
    from .trials import passes  # only a Metal GPU needs the cases

    try:
        if passes(op, extension):
            return True
        why = "it does not agree with float64"
    except (RuntimeError, ValueError) as error:
        why = f"it does not run ({error})"
    warnings.warn(
        f"optiq's Metal kernel for {op} is left alone: {why}; please report what "
        "`optiq doctor --selftest` prints",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
