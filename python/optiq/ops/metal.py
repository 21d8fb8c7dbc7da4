"""Decides which launches of our Metal kernels a GPU may make.

They are tested on emulated threads and have never run on a Mac. MLX compiles a kernel when a graph
that holds it is evaluated, and what is thrown then ends an answer. So nothing enters a graph before
it was evaluated once: each launch, which is what kernels are compiled for (dtypes, widths, rows),
first computes a small case by itself, and then, at each size, the same as stock MLX (contest.py).
One that raises, there or when a graph is built, is wrong, or is slower is left to stock MLX from
then on. Should a graph raise all the same when it is evaluated, whoever built it does so again with
stock MLX: `restarts` is for functions, `give_up` for what goes on where it was
(runtime/generate.py).

OPTIQ_METAL=0 leaves all kernels alone, 1 takes all that are right, also slower ones; `auto`, which
is the default, takes those that are not slower.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

from ..base.failures import forget_failures
from ..errors import UsageError
from . import contest, native
from .contest import Sample

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=contest.Results)
Launch = tuple[Hashable, ...]

FAILED = "its Metal kernel does not run here, or not right"

# (extension, op, launch) -> whether it may run; with the name of a sample -> why it is left, or
# nothing; those of which a warning was given.
_verdicts: dict[tuple[ModuleType, str, Launch], bool] = {}
_contests: dict[tuple[ModuleType, str, Launch, str], str] = {}
_warned: set[ModuleType] = set()
_given_up: set[ModuleType | None] = set()


def mode() -> str:
    """OPTIQ_METAL: 0, 1 or auto. Raises UsageError."""
    value = os.environ.get("OPTIQ_METAL", "auto")
    if value not in ("0", "1", "auto"):
        raise UsageError(f"OPTIQ_METAL={value!r} must be 0, 1 or auto; unset it")
    return value


def enabled() -> ModuleType | None:
    """The extension on a Metal GPU, else None. OPTIQ_METAL=0 leaves its kernels alone."""
    if native.device() != "metal" or mode() == "0":
        return None
    return None if native.extension in _given_up else native.extension


def give_up(why: Exception) -> bool:
    """Leave all kernels alone after a graph with them raised; False where none is in use.

    In any case nothing is left of that graph afterwards (base/failures.py).
    """
    forget_failures()
    extension = enabled()
    if extension is None or not any(_verdicts[key] for key in _verdicts if key[0] is extension):
        return False
    _given_up.add(extension)
    _warn_once(f"s are left alone, since a graph with them raised ({why}); stock MLX goes on")
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


def refusal(
    op: str,
    launch: Launch,
    dtype: mx.Dtype,
    ours: Callable[[ModuleType, mx.array], R],
    stock: Callable[[mx.array], R],
    sample: Sample,
) -> str:
    """Why work of this size is left to stock MLX, or nothing. `dtype` is that of its x.

    The first time both compute it: ours must not be slower, and they must agree.
    """
    extension = proven(op, *launch)
    if extension is None:
        return FAILED
    key = extension, op, launch, sample.name
    if key not in _contests:
        if any(extension.traced(a) for a in sample.reads):
            return ""  # nothing can be evaluated now
        x = sample.x(dtype)
        failed, expected = "", stock(x)  # which raises where the arguments are at fault
        try:
            work = f"{op}, {_text(launch)}, {sample.name}"
            _contests[key] = slower(work, lambda x: ours(extension, x), stock, x)
            if error := contest.difference(ours(extension, x), expected):
                failed = f"it differs from stock MLX by {error} of the largest value"
        except Exception as raised:  # whatever a compiler, a driver or MLX raises
            failed = f"it does not run ({raised})"
        if failed:
            _contests[key] = f"{FAILED}: {failed}"
            warn(op, (*launch, sample.name), failed)
    return _contests[key]


def slower(work: str, ours: contest.Work, stock: contest.Work, x: mx.array) -> str:
    """Why ours is left, or nothing: timed on the first use of this work on this machine."""
    if mode() == "1":
        return ""
    return contest.timings().ask(work, lambda: contest.measure(ours, stock, x)).slower


def run(
    op: str,
    launch: Launch,
    ours: Callable[[ModuleType], T],
    stock: Callable[[], T],
    refused: Callable[[], str] = lambda: "",
) -> T:
    """`ours` where this launch is proven and not refused, else `stock`, also from the moment that
    `ours` raises."""
    extension = proven(op, *launch)
    if extension is None or refused():
        return stock()
    try:
        return ours(extension)
    except Exception as error:
        out = stock()  # also raises where the arguments are at fault
        _verdicts[extension, op, launch] = False
        warn(op, launch, f"it does not run ({error})")
        return out


def warn(op: str, launch: tuple[Hashable, ...], why: str) -> None:
    """One warning for a process; what else fails is left to stock MLX without a word."""
    _warn_once(f" for {op} is left alone, in {_text(launch)}: {why}")


def _warn_once(text: str) -> None:
    if native.extension is None or native.extension in _warned:
        return
    _warned.add(native.extension)
    warnings.warn(
        f"optiq's Metal kernel{text}; please report what `optiq doctor --selftest` prints",
        RuntimeWarning,
        stacklevel=3,
    )


def _text(launch: Hashable) -> str:
    """`one, float16, 1, float16 64 4`: groups of 64 of 4 bits, with their dtype."""
    if not isinstance(launch, tuple):
        return str(launch).removeprefix("mlx.core.")
    return ", ".join(
        " ".join(map(_text, part)) if isinstance(part, tuple) else _text(part) for part in launch
    )
