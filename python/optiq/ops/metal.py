"""Decides which launches of our Metal kernels a GPU may make.

They are tested on emulated threads and have never run on a Mac. MLX compiles a kernel when a graph
that holds it is evaluated, and what is thrown then ends an answer. So nothing enters a graph before
it was evaluated once: each launch, which is what kernels are compiled for (dtypes, widths, rows),
first computes a small case by itself. One that raises, there or when a graph is built, or is wrong
is left to stock MLX from then on. Should a graph raise all the same when it is evaluated, whoever
built it does so again with stock MLX: `restarts` is for functions, `give_up` for what goes on where
it was (runtime/generate.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from . import native

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P")
T = TypeVar("T")

# (extension, op, launch) -> whether it may run; (extension, op) of those that a warning has named.
_verdicts: dict[tuple[ModuleType, str, tuple[Hashable, ...]], bool] = {}
_warned: set[tuple[ModuleType, str]] = set()
_given_up: set[ModuleType | None] = set()


def enabled() -> ModuleType | None:
    """The extension on a Metal GPU, else None. OPTIQ_METAL=0 leaves its kernels alone."""
    if native.device() != "metal" or os.environ.get("OPTIQ_METAL") == "0":
        return None
    return None if native.extension in _given_up else native.extension


def give_up(why: Exception) -> bool:
    """Leave all kernels alone after a graph with them raised; False where none is in use."""
    extension = enabled()
    if extension is None or not any(_verdicts[key] for key in _verdicts if key[0] is extension):
        return False
    _given_up.add(extension)
    warnings.warn(
        f"optiq's Metal kernels are left alone, since a graph with them raised ({why}); it goes on "
        "with stock MLX; please report what `optiq doctor --selftest` prints",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def restarts(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, called again with stock MLX if a graph with kernels of ours raises in it.

    It must evaluate what it computes, and its second call find nothing half done by the first.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if not give_up(error):
                raise
        return function(*args, **kwargs)

    return guarded


def proven(op: str, *launch: Hashable) -> ModuleType | None:
    """The extension on a Metal GPU where this launch of `op` passes its trial, else None.

    What a launch of an op is made of is said in trials.py.
    """
    extension = enabled()
    if extension is None:
        return None
    key = extension, op, launch
    if key not in _verdicts:
        from .trials import passes  # only a Metal GPU needs the cases

        try:
            _verdicts[key] = passes(extension, op, launch)
            why = "it does not agree with float64"
        except Exception as error:  # whatever a compiler, a driver or MLX raises
            _verdicts[key] = False
            why = f"it does not run ({error})"
        if not _verdicts[key]:
            warn(op, launch, why)
    return extension if _verdicts[key] else None


def run(
    op: str, launch: tuple[Hashable, ...], ours: Callable[[ModuleType], T], stock: Callable[[], T]
) -> T:
    """`ours` where this launch is proven, else `stock`, also from the moment that `ours` raises."""
    extension = proven(op, *launch)
    if extension is None:
        return stock()
    try:
        return ours(extension)
    except Exception as error:
        out = stock()  # also raises where the arguments are at fault
        _verdicts[extension, op, launch] = False
        warn(op, launch, f"it does not run ({error})")
        return out


def warn(op: str, launch: tuple[Hashable, ...], why: str) -> None:
    """One warning for an op; what else of it fails is left to stock MLX without a word."""
    extension = native.extension
    if extension is None or (extension, op) in _warned:
        return
    _warned.add((extension, op))
    what = str(launch).replace("mlx.core.", "")
    warnings.warn(
        f"optiq's Metal kernel for {op} is left alone, in {what}: {why}; please report what "
        "`optiq doctor --selftest` prints",
        RuntimeWarning,
        stacklevel=2,
    )
