"""The kernels against float64 on the device at hand: what `optiq doctor --selftest` runs.

The Metal kernels are tested on emulated threads only, so on a Mac this is their first real trial;
the text it gives is meant to be sent to us. Cases and bounds are those of the tests, in short.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np

from . import bench
from .errors import OptiqError
from .formats import AFFINE_BITS, AFFINE_GROUPS, Format
from .ops import native, reference
from .ops.affine import AffineWeight

EPS = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
ROWS = (1, 2, 7, 16, 40)
TIMED = (1, 8)  # rows of the speed lines
SIDE = 2048  # of their weight


class SelftestError(OptiqError):
    """There is nothing to test."""


@dataclass(frozen=True)
class Line:
    """An op: how many cases ran, the largest error as a part of its bound, what went wrong."""

    op: str
    cases: int
    error: float
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a product and of stock MLX's, medians of runs in turn."""

    work: str
    optiq: float
    stock: float


def run(gpu: bool) -> Iterator[Line | Speed]:
    """Every op on the GPU or the CPU, then two speeds. Raises SelftestError without kernels."""
    extension = native.extension
    if extension is None:
        raise SelftestError(f"no native kernels to test: {native.reason}")
    if gpu and not mx.metal.is_available():
        raise SelftestError("no Metal GPU here")
    stream = mx.gpu if gpu else mx.cpu

    def multiply(x: mx.array, w: AffineWeight, transpose: bool = True) -> mx.array:
        out: mx.array = extension.quantized_matmul(
            x, *w[:3], transpose, w.group_size, w.bits, stream=stream
        )
        return out

    def mixed(x: mx.array, w: AffineWeight, transpose: bool = True) -> mx.array:
        out: mx.array = extension.mixed_quantized_matmul(x, [tuple(w), tuple(w)], stream=stream)[1]
        return out

    def experts(x: mx.array, w: AffineWeight, transpose: bool = True) -> mx.array:
        stacked = [mx.stack([mx.zeros_like(a), a]) for a in w[:3]]
        chosen = mx.ones(x.shape[0], dtype=mx.uint32)
        out: mx.array = extension.quantized_matmul(
            x, *stacked, transpose, w.group_size, w.bits, indices=chosen, stream=stream
        )
        return out

    yield _products("quantized_matmul", multiply)
    yield _products("quantized_matmul, not transposed", multiply, transpose=False)
    yield _products("mixed_quantized_matmul", mixed)
    yield _products("quantized_matmul of experts", experts)
    yield _rounding(extension, stream)
    yield from _speeds(multiply, stream)


def machine() -> str:
    """One line: system, chip, MLX."""
    name = platform.platform()
    if mx.metal.is_available():
        name += f", {mx.device_info(mx.gpu)['architecture']}"
    extension = native.extension
    kernels = f"{extension.isa()} kernels" if extension else "no kernels"
    return f"{name}, mlx {mx.__version__}, {kernels}"  # type: ignore[attr-defined]


Multiply = Callable[[mx.array, AffineWeight, bool], mx.array]


def _products(op: str, multiply: Multiply, transpose: bool = True) -> Line:
    rng = np.random.default_rng(0)
    out, inner = 72, 384
    worst, failures, count = 0.0, [], 0
    for bits, group, dtype, rows in product(AFFINE_BITS, AFFINE_GROUPS, EPS, ROWS):
        w = mx.array(rng.standard_normal((out, inner), dtype=np.float32)).astype(dtype)
        weight = AffineWeight(*mx.quantize(w, group, bits), group_size=group, bits=bits)
        width = inner if transpose else out
        x = mx.array(rng.standard_normal((rows, width), dtype=np.float32)).astype(dtype)
        name = f"{rows} rows, {bits} bits, groups of {group}, {dtype}"
        count += 1
        try:
            got = _f64(multiply(x, weight, transpose))
        except (RuntimeError, ValueError) as error:
            failures.append(f"{name}: {error}")
            continue
        dense = reference.dequantize(
            np.array(weight.codes), _f64(weight.scales), _f64(weight.biases), group, bits
        )
        dense = dense if transpose else dense.T
        truth = _f64(x) @ dense.T
        part = float((np.abs(got - truth) / _bound(_f64(x), dense, truth, dtype)).max())
        worst = max(worst, part)
        if not part <= 1:  # a NaN is a failure, too
            failures.append(f"{name}: {part:.3g} times the bound")
    return Line(op, count, worst, tuple(failures))


def _bound(x: np.ndarray, w: np.ndarray, truth: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """One rounding of the output, one of every float32 sum, x in 16-bit fixed point."""
    spread = x.shape[-1] * EPS[mx.float32] * (np.abs(x) @ np.abs(w).T)
    fixed = 0.5 / 32767 * np.abs(x).max(-1, keepdims=True) * np.abs(w).sum(-1)
    return np.asarray(EPS[dtype] * np.abs(truth) + spread + fixed + 1e-30)


def _rounding(extension: object, stream: mx.DeviceType) -> Line:
    """Codes, scales and biases of min/max rounding are those of mx.quantize on the same device."""
    failures, count = [], 0
    for bits, group, dtype in product(AFFINE_BITS, AFFINE_GROUPS, EPS):
        fmt = Format("affine", bits, group)
        w = mx.random.normal((40, 256), key=mx.random.key(bits * group)).astype(dtype)
        expected = mx.quantize(w, group, bits, stream=stream)
        count += 1
        try:
            got = extension.quantize(w, None, group, bits, stream=stream)  # type: ignore[attr-defined]
            same = all(mx.array_equal(a, b).item() for a, b in zip(got, expected, strict=True))
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{fmt}, {dtype}: {error}")
            continue
        if not same:
            failures.append(f"{fmt}, {dtype}: not what mx.quantize gives")
    return Line("quantize", count, 0.0, tuple(failures))


def _speeds(multiply: Multiply, stream: mx.DeviceType) -> Iterator[Speed]:
    dtype = mx.float16 if stream == mx.gpu else mx.float32  # in 16 bits stock takes seconds on CPUs
    w = mx.random.normal((SIDE, SIDE)).astype(dtype)
    weight = AffineWeight(*mx.quantize(w, 64, 4))
    for rows in TIMED:
        x = mx.random.normal((rows, SIDE)).astype(dtype)
        mx.eval(x, weight)
        optiq, stock = _milliseconds(
            partial(multiply, x, weight, True),
            partial(mx.quantized_matmul, x, *weight[:3], stream=stream),
        )
        yield Speed(f"4-bit {SIDE}x{SIDE}, {rows} rows, {dtype}", optiq, stock)


def _milliseconds(*works: Callable[[], mx.array]) -> list[float]:
    """Medians of the works run in turn."""

    def evaluate(work: Callable[[], mx.array]) -> None:
        mx.eval(work())

    times = bench.rounds(
        {str(i): partial(evaluate, work) for i, work in enumerate(works)}, bench.SECONDS
    )
    return [float(np.median(t) * 1e3) for t in times.values()]


def _f64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32), dtype=np.float64)
