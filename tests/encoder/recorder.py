"""Carries out what csrc/metal/encoder.cpp encodes: on Linux, against a stand-in for MLX's device.

    encoder = Encoder()
    x, y = encoder.array(values), encoder.output((4, 64), np.float16)
    encoder.run(plan, [x, w, scales, biases], [y])
    dispatches = encoder.dispatches()
    encoder.execute(dispatches)
    encoder.contents(y)

What lies between two barriers may run at the same time on a GPU, and what a graph does not keep may
be gone by then. So `execute` runs those dispatches in any order it is told, after `run` has
returned, and refuses memory that nobody keeps. The kernels that run are compiled from the text that
Metal would get.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.msl.emulator import InOut, Module, unavailable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "encoder"
MLX = Path((importlib.util.find_spec("mlx.core") or importlib.util.find_spec("mlx")).origin or "")  # type: ignore[union-attr]
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fPIC", "-D_METAL_"]
COMPILER += [
    f"-I{path}" for path in (HERE / "include", ROOT / "csrc", ROOT, MLX.parent / "include")
]
# What is compiled with the encoder: what it calls, and the primitive of a layer.
BESIDE = [f"launch/{name}" for name in ("attention", "copy", "layer", "qmv", "tuning")]
BESIDE += ["ops/decode_layer"]
KINDS = {"input": 0, "output": 1, "temporary": 2, "constants": 3}
CMAKE = shutil.which("cmake") or shutil.which(ROOT / "build/cross/tools/bin/cmake")

reason = unavailable() or (None if CMAKE else "no cmake to run; apt-get install cmake")
needs_recorder = pytest.mark.skipif(reason is not None, reason=str(reason))


class EncoderError(RuntimeError):
    """What the encoder raised, or a command that a GPU could not carry out as it is meant."""


@functools.cache
def library(change: tuple[str, str] | None = None) -> ctypes.CDLL:
    """The encoder with the stand-in, compiled. `change`: a text of encoder.cpp -> another."""
    encoder = (ROOT / "csrc/metal/encoder.cpp").read_text()
    if change is not None:
        old, new = change
        assert encoder.count(old) == 1, f"{old!r} is in encoder.cpp {encoder.count(old)} times"
        encoder = encoder.replace(old, new)
    sources = [HERE / "recorder.cpp", *sorted((HERE / "include").rglob("*.h"))]
    sources += [*sorted((ROOT / "csrc").glob("*/*.h")), *sorted((ROOT / "metal").iterdir())]
    sources += [ROOT / "csrc" / f"{name}.cpp" for name in BESIDE]
    digest = hashlib.sha256(encoder.encode())
    for path in sources:
        digest.update(path.read_bytes())
    target = CACHE / f"encoder-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(encoder, target)
    loaded = ctypes.CDLL(str(target), mode=ctypes.RTLD_LOCAL)
    for name in ("rec_run", "rec_token", "rec_library", "rec_kernel"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.rec_memory.restype = ctypes.c_uint64
    return loaded


def _compile(encoder: str, target: Path) -> None:
    folder = CACHE / f"{target.stem}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    changed = folder / "encoder.cpp"
    changed.write_text(encoder)
    objects = [_object(changed), *_others()]
    part = folder / "encoder.so"
    libraries = MLX.parent / "lib"
    _run([*COMPILER[:1], "-shared", *map(str, objects), f"-L{libraries}", "-lmlx",
          f"-Wl,-rpath,{libraries}", "-o", str(part)])  # fmt: skip
    part.rename(target)
    shutil.rmtree(folder)


@functools.cache
def _others() -> list[Path]:
    """The objects beside the encoder, which no change of it concerns."""
    folder = CACHE / f"others.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = folder / "metal_source.cpp"
    script = ROOT / "cmake" / "embed_metal.cmake"
    _run([str(CMAKE), f"-DSOURCE_DIR={ROOT / 'metal'}", f"-DOUT={embedded}", "-P", str(script)])
    beside = (ROOT / "csrc" / f"{name}.cpp" for name in BESIDE)
    objects = [_object(source) for source in (embedded, HERE / "recorder.cpp", *beside)]
    shutil.rmtree(folder)
    return objects


def _object(source: Path) -> Path:
    """Compiled, or as it was: most of it does not change when the encoder does."""
    done = subprocess.run([*COMPILER, "-E", "-P", str(source)], capture_output=True)
    if done.returncode:
        raise EncoderError(done.stderr.decode())
    digest = hashlib.sha256(done.stdout).hexdigest()[:16]
    target = CACHE / f"{source.stem}-{digest}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        _run([*COMPILER, "-c", str(source), "-o", str(part)])
        part.rename(target)
    return target


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EncoderError(f"{' '.join(command)}\n{done.stderr[:4000]}")


@dataclass(frozen=True)
class Dispatch:
    number: int
    kernel: str
    text: str  # of the library
    after_barrier: bool
    threadgroups: tuple[int, int, int]
    threads: tuple[int, int, int]


@functools.cache
def module(text: str, kernel: str) -> Module:
    return Module(source=text, kernels=[kernel], mode="check")


class Encoder:
    """One command encoder of a GPU, and the arrays of a graph."""

    def __init__(
        self, change: tuple[str, str] | None = None, *, fails: str = "", allowed: int = 1024
    ) -> None:
        self.lib = library(change)
        self.lib.rec_start(fails.encode(), ctypes.c_size_t(allowed))
        self.shapes: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.given: set[int] = set()  # where memory lies that had contents from the beginning

    def array(self, values: npt.NDArray[Any]) -> int:
        """An array of these values and strides, at an offset of its buffer."""
        base = values
        while isinstance(base.base, np.ndarray):
            base = base.base
        offset = values.ctypes.data - base.ctypes.data
        strides = (ctypes.c_int64 * values.ndim)(*(s // values.itemsize for s in values.strides))
        data = base.ctypes.data_as(ctypes.c_void_p)
        number = self._array(values, data, base.nbytes, strides, offset)
        self.given.add(int(self.lib.rec_memory(number)))
        return number

    def output(self, shape: Sequence[int], dtype: npt.DTypeLike) -> int:
        values = np.empty(shape, dtype)
        return self._array(values, None, 0, (ctypes.c_int64 * values.ndim)(), 0)

    def _array(self, values: npt.NDArray[Any], data: Any, count: int, strides: Any, at: int) -> int:
        shape = (ctypes.c_int * values.ndim)(*values.shape)
        number = int(
            self.lib.rec_array(
                shape, values.ndim, values.itemsize, data, ctypes.c_size_t(count), strides,
                ctypes.c_size_t(at),
            )
        )  # fmt: skip
        self.shapes[number] = values.shape, values.dtype
        return number

    def run(self, plan: dict[str, Any], inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """As the primitives do in eval_gpu. Raises EncoderError with what it raised."""
        self.lib.rec_plan()
        for count in plan["temporaries"]:
            self.lib.rec_temporary(ctypes.c_size_t(count))
        for index in plan.get("strided", ()):
            self.lib.rec_strided(index)
        for launch in plan["launches"]:
            sizes = [(ctypes.c_uint32 * 3)(*launch[k]) for k in ("threadgroups", "threads")]
            names = [launch[k].encode() for k in ("source", "kernel", "instantiation")]
            self.lib.rec_launch(*names, *sizes)
            for argument in launch["arguments"]:
                data = bytes(argument.get("bytes") or b"")
                kind, index = KINDS[argument["kind"]], argument.get("index", 0)
                self.lib.rec_argument(kind, index, data, ctypes.c_size_t(len(data)))
        given = [(ctypes.c_int * len(a))(*a) for a in (inputs, outputs)]
        error = self.lib.rec_run(given[0], len(inputs), given[1], len(outputs)).decode()
        if error:
            raise EncoderError(error)

    def layer(self, numbers: Sequence[int], arrays: Sequence[int]) -> None:
        """The layer of the tokens that follow; `numbers` are as in recorder.cpp."""
        given = [(ctypes.c_int * len(a))(*a) for a in (numbers, arrays)]
        self.lib.rec_layer(*given, len(arrays))

    def token(
        self, h: int, caches: Sequence[int], place: Sequence[int], held: bool = False
    ) -> list[int]:
        """h and the caches after a token, as MLX evaluates the primitive. Raises EncoderError."""
        out = (ctypes.c_int * 3)()
        given = [(ctypes.c_int * len(a))(*a) for a in (caches, place)]
        error = self.lib.rec_token(h, *given, held, out).decode()
        if error:
            raise EncoderError(error)
        for number, like in zip(out, (h, *caches), strict=True):
            self.shapes[number] = self.shapes[like]
        return list(out)

    def memory(self, array: int) -> int:
        """Where its buffer lies."""
        return int(self.lib.rec_memory(array))

    def dispatches(self) -> list[Dispatch]:
        found = []
        for i in range(self.lib.rec_dispatches()):
            out = (ctypes.c_uint64 * 7)()
            self.lib.rec_sizes(i, out)
            kernel, text = self.lib.rec_kernel(i).decode(), self.lib.rec_library(i).decode()
            found.append(
                Dispatch(i, kernel, text, bool(out[0]), tuple(out[1:4]), tuple(out[4:7]))  # type: ignore[arg-type]
            )
        return found

    def execute(
        self,
        dispatches: Sequence[Dispatch],
        order: Callable[[list[Dispatch]], list[Dispatch]] = lambda together: together,
    ) -> None:
        """All of them; `order` is that of dispatches without a barrier between them."""
        self._poison(dispatches)
        together: list[Dispatch] = []
        for d in dispatches:
            if d.after_barrier:
                self._execute(order(together))
                together = []
            together.append(d)
        self._execute(order(together))

    def _poison(self, dispatches: Sequence[Dispatch]) -> None:
        """Memory that a kernel writes holds nothing that another could take for a result, unless
        it was given with contents."""
        for d in dispatches:
            for slot, writes in self._buffers(d):
                if writes and self._memory(d, slot).ctypes.data not in self.given:
                    self._memory(d, slot)[:] = 0xFF

    def _execute(self, dispatches: Sequence[Dispatch]) -> None:
        for d in dispatches:
            memory = {slot: self._memory(d, slot) for slot, _ in self._buffers(d)}
            written = [slot for slot, writes in self._buffers(d) if writes]
            arguments = {i: InOut(m) if i in written else m for i, m in memory.items()}
            out, _ = module(d.text, d.kernel)(d.kernel, arguments, d.threadgroups, d.threads)
            for slot, values in zip(sorted(written), out, strict=True):
                memory[slot][:] = values

    def _buffers(self, d: Dispatch) -> list[tuple[int, bool]]:
        """Each buffer of the kernel, and whether it writes it: not where a plan has no use for it
        and therefore binds an input."""
        parameters = module(d.text, d.kernel).built.kernels[d.kernel]
        reads = {
            p.slot: bool(re.search(r"\bconst|__constant", p.text))
            for p in parameters
            if p.kind == "buffer"
        }
        read = {self._memory(d, slot).ctypes.data for slot in reads if reads[slot]}
        return [
            (slot, not reads[slot] and self._memory(d, slot).ctypes.data not in read)
            for slot in reads
        ]

    def _memory(self, d: Dispatch, index: int) -> npt.NDArray[np.uint8]:
        memory, size, offset = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint64()
        kind = self.lib.rec_bound(
            d.number, index, *map(ctypes.byref, (memory, size, offset))
        )  # fmt: skip
        if kind == 0:
            raise EncoderError(f"{d.kernel}: buffer({index}) is not bound")
        if kind == 3:
            raise EncoderError(f"{d.kernel}: nothing keeps buffer({index}) until the GPU is done")
        count = size.value - offset.value
        bytes_ = (ctypes.c_uint8 * count).from_address((memory.value or 0) + offset.value)
        return np.ctypeslib.as_array(bytes_)

    def contents(self, array: int) -> npt.NDArray[Any]:
        shape, dtype = self.shapes[array]
        out = np.empty(shape, dtype)
        self.lib.rec_contents(array, out.ctypes.data_as(ctypes.c_void_p))
        return out
