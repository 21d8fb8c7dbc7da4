"""The kernels against float64 on the device at hand: what `optiq doctor --selftest` runs.

The Metal kernels are tested on emulated threads only, so on a Mac this is their first real trial;
the text it gives is meant to be sent to us. Cases and bounds are those of the tests.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import mlx.core as mx
import numpy as np

from ..errors import OptiqError
from ..ops import attention_cases, cases, layer_cases, native, trials
from . import bench

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

    def line(op: str, check: Callable[..., float], table: Sequence[object], **how: bool) -> Line:
        worst, failures = 0.0, []
        for case in table:
            try:
                with mx.stream(stream):
                    part = check(extension, case, **how)
            except (RuntimeError, ValueError, TypeError) as failure:
                failures.append(f"{case}: {failure}")
                continue
            worst = max(worst, part)
            if not part <= 1:  # a NaN is a failure as well
                failures.append(f"{case}: {part:.3g} times the bound")
        return Line(op, len(table), worst, tuple(failures))

    cpu, some = not gpu, cases.QUANTIZED[::4]
    yield line("quantized_matmul", trials.multiply, cases.QUANTIZED, cpu=cpu)
    yield line("quantized_matmul, not transposed", trials.multiply, some, transpose=False)
    yield line("mixed_quantized_matmul", trials.multiply_mixed, some, cpu=cpu)
    yield line("quantized_matmul of experts", trials.multiply_experts, some, cpu=cpu)
    yield line("quantize, min/max", trials.round_minmax, cases.ROUNDINGS)
    yield line("quantize, search", trials.round_by_search, cases.ROUNDINGS)
    yield line("kl_divergence", trials.compare, cases.PAIRS, cpu=cpu)
    yield line("quantize_kv", trials.store, attention_cases.RECORDS)
    yield line("quantized_attention", trials.attend, attention_cases.LONG_ATTENTION)
    yield line("gathered_low_rank", trials.add_terms, cases.TERMS)
    if gpu:
        experts = trials.multiply_experts
        yield line("quantized_matmul of sorted experts", experts, some, sorted_indices=True)
        yield line("decode_layer", trials.decode, layer_cases.LAYERS)
    yield from _speeds(extension, stream)


def machine() -> str:
    """One line: system, chip, MLX."""
    name = platform.platform()
    if mx.metal.is_available():
        name += f", {mx.device_info(mx.gpu)['architecture']}"
    extension = native.extension
    kernels = f"{extension.isa()} kernels" if extension else "no kernels"
    return f"{name}, mlx {mx.__version__}, {kernels}"  # type: ignore[attr-defined]


def _speeds(extension: ModuleType, stream: mx.DeviceType) -> Iterator[Speed]:
    dtype = mx.float16 if stream == mx.gpu else mx.float32  # in 16 bits stock takes seconds on CPUs
    w = mx.random.normal((SIDE, SIDE)).astype(dtype)
    weight = mx.quantize(w, 64, 4)
    for rows in TIMED:
        x = mx.random.normal((rows, SIDE)).astype(dtype)
        mx.eval(x, weight)
        optiq, stock = _milliseconds(
            partial(extension.quantized_matmul, x, *weight, True, 64, 4, stream=stream),
            partial(mx.quantized_matmul, x, *weight, stream=stream),
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
