"""Run Metal kernels on NumPy arrays: the Python side of the emulator.

    module = Module("metal/qmv.metal", {"qmv": "qmv<half, 64, 4>"}, mode="check")
    (y,), counters = module("qmv", {0: w, 1: x, 2: Out((1, n), np.float16), 3: np.int32(k)},
                            grid=(1, n // 8, 1), threads=(32, 2, 1))

bfloat16 travels as uint16. A test module that uses this wants `pytestmark = needs_emulator`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from .build import CACHE, ROOT, Built, CompileError, _key, _write, build, unavailable
from .counters import Counters, RawCounters
from .launcher import Parameter
from .symbols import readable

__all__ = [
    "APPLE",
    "Chip",
    "CompileError",
    "Counters",
    "InOut",
    "KernelError",
    "Module",
    "Out",
    "needs_emulator",
]

BUFFERS = 31
MAX_THREADS = 1024
MAX_THREADGROUP_BYTES = 32768
# Mirrors of rt/runtime.h.
WRITABLE, UNWRITTEN = 1, 2
ALLOW_DIVERGENCE, SHUFFLE, GRID_IS_THREADS, FLUSH = 1, 2, 4, 8

needs_emulator = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

Size = tuple[int, int, int]


class KernelError(RuntimeError):
    """A kernel did what Metal forbids; the message has buffer, byte, thread and source line."""


class Out:
    """A buffer that the kernel fills. Reading it before writing it is an error in check mode."""

    def __init__(self, shape: int | Sequence[int], dtype: npt.DTypeLike) -> None:
        self.array = np.empty(shape, dtype)


class InOut:
    """A buffer with contents that the kernel may change; the array given is not changed."""

    def __init__(self, array: npt.ArrayLike) -> None:
        self.array = np.asarray(array, order="C")


@dataclass(frozen=True)
class Chip:
    """What Metal leaves to the compiler and the chip, as Apple's do it unless told otherwise.

    Args:
        number: other chips than 0 sum lanes and products of matrices in orders of their own, and
            have functions (exp, log, ...) that are off by up to 2 ulp.
        contracts: `a * b + c` is one fma.
        flushes: denormal floats are zeros.
    """

    number: int = 0
    contracts: bool = True
    flushes: bool = True


APPLE = Chip()

Argument = np.ndarray | np.generic | Out | InOut


class _BufferArgument(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("buffers", _BufferArgument * BUFFERS),
        ("threadgroup_bytes", ctypes.c_uint64 * BUFFERS),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("flags", ctypes.c_uint32),
        ("seconds", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("chip", ctypes.c_uint64),
    )


_CONSTANT_TYPES: dict[str, Any] = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "uint": ctypes.c_uint32,
    "short": ctypes.c_int16,
    "ushort": ctypes.c_uint16,
    "float": ctypes.c_float,
}


class Module:
    """A compiled Metal source.

    Args:
        path: a .metal file, relative to the current folder or to the repository; or pass `source`.
        kernels: name to kernel expression ("qmv<half, 64>") or to a [[host_name]]; a list of such;
            None takes every kernel that is no template and every [[host_name]].
        mode: "check" finds bugs and counts bytes; "fast" is several times faster.
        chip: what it is compiled for and, unless a launch says otherwise, runs on.
        include: folders for #include. define: "NAME" or "NAME=value".

    Raises:
        CompileError: with the compiler's errors. KeyError: a kernel that the source lacks.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        kernels: Mapping[str, str] | Sequence[str] | None = None,
        *,
        mode: Literal["check", "fast"] = "check",
        chip: Chip = APPLE,
        include: Sequence[str | Path] = (),
        define: Sequence[str] = (),
        source: str | None = None,
    ) -> None:
        if (path is None) == (source is None):
            raise TypeError("Module takes a path or a source")
        file = _stored(source) if source is not None else _found(Path(path or ""))
        wanted = dict(kernels) if isinstance(kernels, Mapping) else kernels
        self._open(build(file, wanted, mode, include, define, contract=chip.contracts), mode, chip)

    @classmethod
    def of(cls, built: Built, mode: str = "check", chip: Chip = APPLE) -> Module:
        """What was compiled elsewhere."""
        module = cls.__new__(cls)
        module._open(built, mode, chip)
        return module

    def _open(self, built: Built, mode: str, chip: Chip) -> None:
        self.built, self.mode, self.chip = built, mode, chip
        self.kernels = tuple(self.built.kernels)
        self._library = ctypes.CDLL(str(self.built.library), mode=ctypes.RTLD_LOCAL)
        self._library.msl_launch.argtypes = (
            ctypes.POINTER(_Launch),
            ctypes.POINTER(RawCounters),
        )
        self._lock = threading.Lock()  # the runtime has one engine a module

    def constant(self, name: str, value: bool | int | float) -> None:
        """Set a function constant; it stays set, and is_function_constant_defined is true."""
        if name not in self.built.constants:
            known = ", ".join(self.built.constants) or "none"
            raise KeyError(f"no function constant {name!r}; this source has: {known}")
        _, kind = self.built.constants[name]
        _CONSTANT_TYPES[kind].in_dll(self._library, name).value = value
        ctypes.c_bool.in_dll(self._library, f"{name}__defined").value = True

    def __call__(
        self,
        kernel: str,
        arguments: Mapping[int, Argument],
        grid: Size,
        threads: Size,
        threadgroup_memory: Mapping[int, int] | None = None,
        *,
        shuffle: bool | int = False,
        chip: Chip | None = None,
        allow_divergence: bool = False,
        dispatch_threads: bool = False,
        seconds: int = 60,
    ) -> tuple[list[np.ndarray], Counters]:
        """Dispatch once and wait.

        Args:
            arguments: buffer index to an array or NumPy scalar (read only), Out or InOut.
            grid: threadgroups in x, y, z; with `dispatch_threads` it counts threads.
            threads: threads of a threadgroup in x, y, z; at most 1024.
            threadgroup_memory: bytes for each [[threadgroup(i)]] argument.
            shuffle: run lanes and simdgroups in random order; an integer is the seed.
            chip: another than the module's, that contracts as it does.
            allow_divergence: run a simdgroup function on the lanes that reach it, as a GPU does,
                instead of reporting the lanes that do not.
            seconds: limit on the processor time.

        Returns:
            The arrays of Out and InOut in the order of their indices, and what was counted.

        Raises:
            KernelError: a bug in the kernel. ValueError, TypeError: a bug in the launch.
        """
        if kernel not in self.kernels:
            raise KeyError(f"no kernel {kernel!r}; this module has: {', '.join(self.kernels)}")
        chip = chip or self.chip
        if chip.contracts != self.chip.contracts:
            raise ValueError("contraction is a matter of compiling: give the chip to Module")
        signature = self.built.kernels[kernel]
        number = self.kernels.index(kernel)
        launch, raw = _Launch(), RawCounters()
        entry = getattr(self._library, f"msl_entry_{number}")
        launch.entry = ctypes.cast(entry, ctypes.c_void_p).value
        launch.grid[:], launch.threads[:] = _sizes(grid, threads)
        launch.flags = (
            ALLOW_DIVERGENCE * allow_divergence
            | SHUFFLE * (shuffle is not False)
            | GRID_IS_THREADS * dispatch_threads
            | FLUSH * chip.flushes
        )
        launch.seed, launch.seconds, launch.chip = int(shuffle), seconds, chip.number
        _bind_memory(kernel, launch, signature, threadgroup_memory or {})
        _check_aliases(kernel, arguments)
        arrays = {i: _array(kernel, i, a) for i, a in arguments.items()}
        self._check_sizes(kernel, number, signature, arrays)
        for i, array in arrays.items():
            flags = {Out: WRITABLE | UNWRITTEN, InOut: WRITABLE}.get(type(arguments[i]), 0)
            launch.buffers[i] = _BufferArgument(array.ctypes.data, array.nbytes, flags, 0)
        with self._lock:
            failed = self._library.msl_launch(ctypes.byref(launch), ctypes.byref(raw))
        if failed:
            report = raw.error.decode(errors="replace")
            variables = self.built.threadgroup_variables
            raise KernelError(f"{kernel}: {readable(report, self.built.library, variables)}")
        outputs = [arrays[i] for i in sorted(arrays) if isinstance(arguments[i], (Out, InOut))]
        return outputs, Counters.of(raw, counted=self.mode == "check")

    def _check_sizes(
        self, kernel: str, number: int, signature: list[Parameter], arrays: dict[int, np.ndarray]
    ) -> None:
        buffers = [p for p in signature if p.kind == "buffer"]
        sizes = (ctypes.c_uint32 * (len(buffers) + 1)).in_dll(self._library, f"msl_sizes_{number}")
        by_index = {p.slot: (p, size) for p, size in zip(buffers, sizes, strict=False)}
        for i, array in arrays.items():
            if i not in by_index:
                raise ValueError(f"{kernel} has no buffer({i}); it has {sorted(by_index)}")
            parameter, size = by_index[i]
            element, is_reference = size & 0x7FFFFFFF, size >> 31
            wrong = array.nbytes != element if is_reference else array.nbytes % element
            if wrong:
                raise ValueError(
                    f"{kernel}: buffer({i}) has {array.nbytes} bytes, but `{parameter.text}` "
                    f"{'is' if is_reference else 'has elements of'} {element} bytes"
                )


def _found(path: Path) -> Path:
    candidates = [path, ROOT / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise FileNotFoundError(f"no Metal source at {' or '.join(map(str, candidates))}")


def _stored(source: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"source-{_key(source)[:12]}.metal"
    if not path.exists():
        _write(path, source)
    return path


def _sizes(grid: Size, threads: Size) -> tuple[Size, Size]:
    for what, size in (("grid", grid), ("threads", threads)):
        if len(size) != 3 or any(n < 1 for n in size):
            raise ValueError(f"{what} is three positive numbers, not {size}")
    if (total := int(np.prod(threads))) > MAX_THREADS:
        raise ValueError(f"a threadgroup of {total} threads; Metal allows {MAX_THREADS}")
    return grid, threads


def _bind_memory(
    kernel: str, launch: _Launch, signature: list[Parameter], memory: Mapping[int, int]
) -> None:
    declared = {p.slot for p in signature if p.kind == "threadgroup"}
    if declared != set(memory):
        raise ValueError(
            f"{kernel} has threadgroup arguments {sorted(declared)}, but the launch gives memory "
            f"for {sorted(memory)}"
        )
    if sum(memory.values()) > MAX_THREADGROUP_BYTES:
        raise ValueError(f"threadgroup memory over 32 KiB: {sum(memory.values())} bytes")
    for i, count in memory.items():
        launch.threadgroup_bytes[i] = count


def _check_aliases(kernel: str, arguments: Mapping[int, Argument]) -> None:
    """Apple's compiler takes it that what a kernel writes is bound once (air-buffer-no-alias)."""
    memory = {
        i: a.array if isinstance(a, (Out, InOut)) else np.asarray(a) for i, a in arguments.items()
    }
    for i in (i for i, a in arguments.items() if isinstance(a, (Out, InOut))):
        for j, other in memory.items():
            if i != j and np.may_share_memory(memory[i], other):
                raise ValueError(
                    f"{kernel}: buffer({min(i, j)}) and buffer({max(i, j)}) overlap, and the "
                    "kernel writes one; Apple's compiler takes it that they do not"
                )


def _array(kernel: str, index: int, argument: Argument) -> np.ndarray:
    if not 0 <= index < BUFFERS:
        raise ValueError(f"{kernel}: buffer index {index}; Metal has 0 to {BUFFERS - 1}")
    if isinstance(argument, (Out, InOut)):
        return argument.array.copy()
    if not isinstance(argument, (np.ndarray, np.generic)):
        raise TypeError(
            f"{kernel}: buffer({index}) is a {type(argument).__name__}; pass a NumPy array or "
            "scalar, so that its type is known"
        )
    return np.asarray(argument, order="C")
