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
from types import ModuleType

import mlx.core as mx
import numpy as np

from ..errors import OptiqError
from ..formats import AFFINE_BITS, AFFINE_GROUPS
from ..ops import native, reference
from ..ops.affine import AffineWeight
from . import bench

EPS = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
ROWS = (1, 2, 7, 16, 40)
TIMED = (1, 8)  # rows of the speed lines
SIDE = 2048  # of their weight
SPREAD = 4.0  # deviation of logits


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

    yield _line("quantized_matmul", _products(multiply))
    yield _line("quantized_matmul, not transposed", _products(multiply, transpose=False))
    yield _line("mixed_quantized_matmul", _products(mixed))
    yield _line("quantized_matmul of experts", _products(experts))
    yield _line("quantize", _rounding(extension, stream))
    yield _line("kl_divergence", _kl(extension, stream))
    yield _line("quantized_attention", _attention(extension, stream))
    yield from _speeds(multiply, stream)


def machine() -> str:
    """One line: system, chip, MLX."""
    name = platform.platform()
    if mx.metal.is_available():
        name += f", {mx.device_info(mx.gpu)['architecture']}"
    extension = native.extension
    kernels = f"{extension.isa()} kernels" if extension else "no kernels"
    return f"{name}, mlx {mx.__version__}, {kernels}"  # type: ignore[attr-defined]


# A case: its name, and its error as a part of the bound.
Cases = Iterator[tuple[str, Callable[[], float]]]


def _line(op: str, cases: Cases) -> Line:
    worst, failures, count = 0.0, [], 0
    for name, error in cases:
        count += 1
        try:
            part = error()
        except (RuntimeError, ValueError, TypeError) as failure:
            failures.append(f"{name}: {failure}")
            continue
        worst = max(worst, part)
        if not part <= 1:  # a NaN is a failure, too
            failures.append(f"{name}: {part:.3g} times the bound")
    return Line(op, count, worst, tuple(failures))


Multiply = Callable[[mx.array, AffineWeight, bool], mx.array]


def _products(multiply: Multiply, transpose: bool = True) -> Cases:
    rng = np.random.default_rng(0)
    out, inner = 72, 384
    for bits, group, dtype, rows in product(AFFINE_BITS, AFFINE_GROUPS, EPS, ROWS):
        w = mx.array(rng.standard_normal((out, inner), dtype=np.float32)).astype(dtype)
        weight = AffineWeight(*mx.quantize(w, group, bits), group_size=group, bits=bits)
        width = inner if transpose else out
        x = mx.array(rng.standard_normal((rows, width), dtype=np.float32)).astype(dtype)
        name = f"{rows} rows, {bits} bits, groups of {group}, {dtype}"
        yield name, partial(_product_error, multiply, x, weight, transpose)


def _product_error(multiply: Multiply, x: mx.array, weight: AffineWeight, transpose: bool) -> float:
    got = _f64(multiply(x, weight, transpose))
    dense = _dense(weight) if transpose else _dense(weight).T
    truth = _f64(x) @ dense.T
    return float((np.abs(got - truth) / _bound(_f64(x), dense, truth, x.dtype)).max())


def _bound(x: np.ndarray, w: np.ndarray, truth: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """One rounding of the output, one of every float32 sum, x in 16-bit fixed point."""
    spread = x.shape[-1] * EPS[mx.float32] * (np.abs(x) @ np.abs(w).T)
    fixed = 0.5 / 32767 * np.abs(x).max(-1, keepdims=True) * np.abs(w).sum(-1)
    return np.asarray(EPS[dtype] * np.abs(truth) + spread + fixed + 1e-30)


def _rounding(extension: ModuleType, stream: mx.DeviceType) -> Cases:
    """Codes, scales and biases of min/max rounding are those of mx.quantize on the same device;
    the search is no worse in what it minimises."""
    for bits, group, dtype in product(AFFINE_BITS, AFFINE_GROUPS, EPS):
        w = mx.random.normal((40, 256), key=mx.random.key(bits * group)).astype(dtype)
        stock = AffineWeight(*mx.quantize(w, group, bits, stream=stream), group, bits)
        name = f"{bits} bits, groups of {group}, {dtype}"
        yield name, partial(_minmax_error, extension, w, stock, stream)
        yield f"search, {name}", partial(_search_error, extension, w, stock, stream)


def _minmax_error(
    extension: ModuleType, w: mx.array, stock: AffineWeight, stream: mx.DeviceType
) -> float:
    got = extension.quantize(w, None, stock.group_size, stock.bits, stream=stream)
    if not all(mx.array_equal(a, b).item() for a, b in zip(got, stock[:3], strict=True)):
        raise ValueError("not what mx.quantize gives")
    return 0.0


def _search_error(
    extension: ModuleType, w: mx.array, stock: AffineWeight, stream: mx.DeviceType
) -> float:
    importance = mx.random.uniform(0.1, 1.0, w.shape[-1:], key=mx.random.key(0))
    found = extension.quantize(w, importance, stock.group_size, stock.bits, stream=stream)
    c = reference.search_weights(_f64(w), _f64(importance), stock.group_size)

    def error(a: AffineWeight) -> float:
        return float((c * (_dense(a) - _f64(w)) ** 2).sum())

    codes, scales, biases = found
    return error(AffineWeight(codes, scales, biases, stock.group_size, stock.bits)) / error(stock)


def _attention(extension: ModuleType, stream: mx.DeviceType) -> Cases:
    """Records and attention over them, for a padded batch; dimensions and dtypes go round."""
    widths = ((8, 8), (8, 4), (4, 4), (6, 3), (5, 5))
    for i, ((k_bits, v_bits), rows) in enumerate(product(widths, (1, 6, 40))):
        formats = (64, k_bits), (32, v_bits)
        dim, dtype = (64, 80, 128, 256)[i % 4], list(EPS)[i % 3]
        name = f"{rows} rows, K{k_bits} V{v_bits}, head_dim {dim}, {dtype}"
        yield name, partial(_attention_error, extension, stream, formats, dim, dtype, rows)


def _attention_error(
    extension: ModuleType,
    stream: mx.DeviceType,
    formats: tuple[tuple[int, int], tuple[int, int]],
    dim: int,
    dtype: mx.Dtype,
    rows: int,
) -> float:
    """A part of one rounding of the result and of float32 sums."""
    keys, starts = 1100, np.array([0, 90])
    q, k, v = (
        mx.random.normal((2, heads, n, dim), key=mx.random.key(i)).astype(dtype)
        for i, (heads, n) in enumerate(((6, rows), (2, keys), (2, keys)))
    )
    stored, exact = [], []
    for x, (group, bits) in zip((k, v), formats, strict=True):
        stored.append(extension.quantize_kv(x, group, bits, stream=stream))
        exact.append(reference.dequantize_kv(np.array(stored[-1]), dim, group, bits))
    got = extension.quantized_attention(
        q, *stored, *formats, dim**-0.5, "causal", starts=mx.array(starts), stream=stream
    )
    query, key = np.arange(keys - rows, keys)[:, None], np.arange(keys)
    seen = (key <= query) & (key >= starts[:, None, None, None])
    truth = reference.attention(_f64(q), exact[0], exact[1], dim**-0.5, seen)
    return float((np.abs(_f64(got) - truth) / (EPS[dtype] * np.abs(truth) + 1e-5)).max())


def _kl(extension: ModuleType, stream: mx.DeviceType) -> Cases:
    """A dense head against one of each width."""
    rng = np.random.default_rng(0)
    for bits, dtype, cap in product((0, *AFFINE_BITS), EPS, (0.0, 30.0)):
        h = rng.standard_normal((2, 33, 128), dtype=np.float32)
        h_p, h_q = (mx.array(a).astype(dtype) for a in (h[0], h[0] + 0.3 * h[1]))
        w = mx.array(SPREAD / 128**0.5 * rng.standard_normal((500, 128), dtype=np.float32))
        w_p = w.astype(dtype)
        w_q = AffineWeight(*mx.quantize(w_p, 64, bits), 64, bits) if bits else w_p
        name = f"{bits or 'no'} bits, {dtype}, soft cap {cap:g}"
        yield name, partial(_kl_error, extension, (h_p, w_p, h_q, w_q), cap, stream)


def _kl_error(
    extension: ModuleType,
    sides: tuple[mx.array, mx.array, mx.array, mx.array | AffineWeight],
    cap: float,
    stream: mx.DeviceType,
) -> float:
    """Of the KL and both log-sum-exps, by several errors of a float32 logit."""
    h_p, w_p, h_q, w_q = sides
    if isinstance(w_q, AffineWeight):
        arrays, fmt, dense = list(w_q[:3]), w_q[3:], _dense(w_q)
    else:
        arrays, fmt, dense = [w_q], (0, 0), _f64(w_q)
    got = extension.kl_divergence(h_p, [w_p], h_q, arrays, (0, 0), fmt, cap, stream=stream)
    truth = reference.kl_divergence(_f64(h_p), _f64(w_p), _f64(h_q), dense, soft_cap=cap or None)
    bound = SPREAD * 64 * EPS[mx.float32]
    return max(float(np.abs(_f64(got[i]) - truth[i]).max()) / bound for i in (0, 2, 3))


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


def _dense(w: AffineWeight) -> np.ndarray:
    codes = np.array(w.codes)
    return reference.dequantize(codes, _f64(w.scales), _f64(w.biases), w.group_size, w.bits)


def _f64(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32), dtype=np.float64)
