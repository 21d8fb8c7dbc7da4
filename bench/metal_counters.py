"""What our Metal kernels move, against MLX's own for the same job, both on the CPU emulator.

    python -m bench.metal_counters

Prints Markdown tables for docs/kernels-counted.md. "read" is what all lanes ask for together;
"lines" are distinct 64-byte lines, summed over threadgroups: what reaches a core at least once.
The emulator says nothing about time. Stock means the launches of MLX 0.32 (its source file
mlx/backend/metal/quantized.cpp)
on an M3 or M4 Max (applegpu_g15s), which are planned below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

import optiq  # noqa: F401
from optiq.ops.cases import Product
from tests.metal.launcher import plan_quantized_matmul, run, to_numpy
from tests.msl.emulator import Counters, Module, Out
from tests.msl.mlx_headers import INCLUDE, QUANTIZED

GPU = "applegpu_g15s"
GROUP = 64


@dataclass
class Figures:
    dispatches: int = 0
    codes: int = 0  # bytes read, as all below
    scales: int = 0
    x: int = 0
    written: int = 0
    other: int = 0  # a second pass over partial sums
    lines: int = 0
    barriers: int = 0
    memory: int = 0  # threadgroup bytes

    @property
    def read(self) -> int:
        return self.codes + self.scales + self.x + self.other

    def __add__(self, o: Figures) -> Figures:
        pairs = zip(vars(self).values(), vars(o).values(), strict=True)
        sums = [a + b for a, b in pairs]
        return Figures(*sums[:-1], max(self.memory, o.memory))


def gather(c: Counters, codes: list[int], scales: list[int], x: int, y: list[int]) -> Figures:
    def read(buffers: Sequence[int]) -> int:
        return sum(c.bytes_read[i] for i in buffers)

    written = sum(c.bytes_written[i] for i in y)
    lines = 64 * sum(c.lines_read_by_threadgroups[i] for i in (*codes, *scales, x))
    args = (c.dispatches, read(codes), read(scales), read([x]), written, 0, lines)
    return Figures(*args, c.barriers, c.threadgroup_memory)


def ours(cases: Sequence[Product], transpose: bool = True) -> Figures:
    """One launch for all the weights."""
    rows = cases[0].rows
    x = cases[0].activations(None if transpose else cases[0].out)
    outs = [c.out if transpose else c.inner for c in cases]
    weights = [(out, (c.group_size, c.bits)) for out, c in zip(outs, cases, strict=True)]
    plan = plan_quantized_matmul(rows, x.shape[-1], weights, transpose=transpose, gpu=GPU)
    inputs = [x, *(a for c in cases for a in c.quantized())]
    _, counters = run(plan, inputs, [((rows, out), x.dtype) for out in outs])
    slots = 1 if len(cases) == 1 else 4
    codes = [1 + 3 * p for p in range(len(cases))]
    scales = [i + j for i in codes for j in (1, 2)]
    figures = gather(counters, codes, scales, 0, [1 + 3 * slots + p for p in range(len(cases))])
    figures.other = sum(plan["temporaries"])  # of one weight: where qmm has x, qmm_merge has sums
    figures.x -= figures.other
    return figures


def stock(case: Product) -> Figures:
    """MLX's choice of kernel for one weight: QuantizedMatmul::eval_gpu and what it calls."""
    m, n, k, bits = case.rows, case.out, case.inner, case.bits
    limit = 13 if max(k, n) <= 2048 else 15 if max(k, n) <= 4096 else 13
    template = f"half, {GROUP}, {bits}"
    if m == 1:
        kernel = "affine_qmv" if n % 8 or k % 512 else "affine_qmv_fast"
        return _stock(f"{kernel}<{template}, false>", case, (1, -(-n // 8), 1), (32, 2, 1), 2)
    if m < limit:
        tiles = -(-m // 5)
        per_tile = -(-m // tiles)
        grid = (-(-m // per_tile), -(-n // 8), 1)
        kernel = f"affine_qmv_wide<{template}, {per_tile}, 8, false>"
        return _stock(kernel, case, grid, (32, 2, 1), 3)
    row_tiles, col_tiles = -(-m // 32), -(-n // 32)
    split = min(max(1, 512 // (row_tiles * col_tiles)), k // GROUP)
    while split > 1 and k % (split * GROUP):
        split -= 1
    if split <= 1:
        kernel = f"affine_qmm_t<{template}, true, false>"
        return _stock(kernel, case, (col_tiles, row_tiles, 1), (32, 2, 2), 3)
    kernel = f"affine_qmm_t_splitk<{template}, true>"
    figures = _stock(kernel, case, (col_tiles, row_tiles, split), (32, 2, 2), 3, split=split)
    # Then a sum over the partitions, derived: reads them once, writes the result.
    return figures + Figures(1, written=2 * m * n, other=4 * split * m * n)


def stock_not_transposed(case: Product) -> Figures:
    """For x @ w; here the case's `out` is what x has columns."""
    m, n, template = case.rows, case.inner, f"half, {GROUP}, {case.bits}, false"
    if m < 4 and case.out < 1024:
        grid = (m, -(-n // 64), 1)
        return _stock(f"affine_qvm<{template}>", case, grid, (32, 2, 1), 2, transpose=False)
    grid = (-(-n // 32), -(-m // 32), 1)
    return _stock(f"affine_qmm_n<{template}>", case, grid, (32, 2, 2), 3, transpose=False)


def experts(rows: int, of: int, width: int, bits: int) -> tuple[Figures, Figures]:
    """Ours and stock for rows that go to one of several weights [width, width]."""
    case = Product(rows, width * of, width, bits, GROUP, "f16")
    x = case.activations()
    weight = [a.reshape(of, width, -1) for a in case.quantized()]
    which = np.random.default_rng(0).integers(0, of, rows).astype(np.uint32)
    plan = plan_quantized_matmul(rows, width, [(width, (GROUP, bits))], experts=of, gpu=GPU)
    _, counters = run(plan, [x, *weight, mx.array(which)], [((rows, width), x.dtype)])
    here = gather(counters, [1], [2, 3], 0, [5])

    arguments: dict[int, Any] = {i: to_numpy(a) for i, a in enumerate((*weight, x))}
    arguments |= {4: np.arange(rows, dtype=np.uint32), 5: which}
    arguments |= {6: Out((rows, width), np.float16), 7: np.int32(width), 8: np.int32(width)}
    shape, strides = np.array([rows, 1, width], np.int32), np.array([width, width, 1], np.int64)
    arguments |= {9: np.int32(1), 10: shape, 11: strides}  # x as [rows, 1, width]
    sizes = [np.array([a.shape[1] * a.shape[2]], np.int64) for a in weight]
    arguments |= {12: np.int32(1), 13: np.array([of], np.int32)}
    arguments |= {14 + i: size for i, size in enumerate(sizes)}
    one = np.ones(1, np.int64)
    arguments |= {17: np.int32(1), 18: np.array([rows], np.int32), 19: one, 20: one}
    kernel = _module(f"affine_gather_qmv_fast<half, {GROUP}, {bits}>")
    _, counters = kernel("k", arguments, grid=(1, width // 8, rows), threads=(32, 2, 1))
    return here, gather(counters, [0], [1, 2], 3, [6])


def sorted_experts(each: int, of: int, width: int, bits: int) -> tuple[Figures, Figures]:
    """Ours and stock for as many rows to each of several weights [width, width], in their order.

    Both first look where each weight's rows begin; of stock that is a dispatch and no bytes.
    """
    rows = each * of
    case = Product(rows, width * of, width, bits, GROUP, "f16")
    x = case.activations()
    weight = [a.reshape(of, width, -1) for a in case.quantized()]
    which = np.repeat(np.arange(of, dtype=np.uint32), each)
    plan = plan_quantized_matmul(
        rows, width, [(width, (GROUP, bits))], experts=of, sorted=True, gpu=GPU
    )
    _, counters = run(plan, [x, *weight, mx.array(which)], [((rows, width), x.dtype)])
    here = gather(counters, [1], [2, 3], 0, [5])
    here.other = counters.bytes_read[4]
    here.lines += 64 * counters.lines_read_by_threadgroups[4]

    arguments: dict[int, Any] = {0: to_numpy(x)}
    arguments |= {1 + i: to_numpy(a) for i, a in enumerate(weight)}
    arguments |= {4: np.arange(0, rows, each, dtype=np.int32), 5: Out((rows, width), np.float16)}
    arguments |= {6 + i: np.int32(n) for i, n in enumerate((rows, width, width, of))}
    kernel = _module(f"affine_gather_qmm_rhs<half, {GROUP}, {bits}, 16, 32, 32, 1, 2, true>")
    for name in ("align_N", "align_K"):
        kernel.constant(name, True)
    grid = (width // 32, rows // 16 + of, 1)
    _, counters = kernel("k", arguments, grid=grid, threads=(32, 2, 1))
    there = gather(counters, [1], [2, 3], 0, [5]) + Figures(1)
    there.other = counters.bytes_read[4]
    there.lines += 64 * counters.lines_read_by_threadgroups[4]
    return here, there


@cache
def _module(kernel: str) -> Module:
    return Module(source=QUANTIZED, kernels={"k": kernel}, include=[INCLUDE])


def _stock(
    kernel: str,
    case: Product,
    grid: Any,
    threads: Any,
    sizes: int,
    *,
    split: int = 0,
    transpose: bool = True,
) -> Figures:
    m, n, k = case.rows, case.out, case.inner
    if not transpose:
        n, k = k, n
    operands = (*case.quantized(), case.activations(k))
    arguments: dict[int, Any] = {i: to_numpy(a) for i, a in enumerate(operands)}
    arguments[4] = Out((split, m, n), np.float32) if split else Out((m, n), np.float16)
    arguments |= {5 + i: np.int32(v) for i, v in enumerate((k, n, m)[:sizes])}
    if split:
        arguments |= {8: np.int32(k // split), 9: np.int32(m * n)}
    else:  # batch axes: none
        none, strides = np.zeros(1, np.int32), np.zeros(1, np.int64)
        rest = (np.int32(0), none, strides, np.int32(0), none, strides, strides, strides)
        arguments |= {5 + sizes + i: v for i, v in enumerate(rest)}
    _, counters = _module(kernel)("k", arguments, grid=grid, threads=threads)
    return gather(counters, [0], [1, 2], 3, [4])


def count(rows: int) -> str:
    return f"{rows} row" + "s" * (rows > 1)


def row(name: str, a: Figures, b: Figures) -> str:
    """Ours / stock in each column."""

    def mb(x: int, y: int) -> str:
        return f"{x / 1e6:.2f} / {y / 1e6:.2f}"

    cells = [
        f"{a.dispatches} / {b.dispatches}",
        mb(a.codes, b.codes),
        mb(a.scales, b.scales),
        mb(a.x, b.x),
        mb(a.read, b.read),
        mb(a.lines, b.lines),
        mb(a.written, b.written),
        f"{a.barriers} / {b.barriers}",
        f"{a.memory} / {b.memory}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


HEAD = (
    "| product | dispatches | codes | scales, biases | x | read | lines | written | barriers "
    "| threadgroup bytes |\n" + "|---" * 10 + "|"
)


def single() -> Iterator[str]:
    for bits, rows in [
        *((4, m) for m in (1, 2, 4, 5, 8, 12, 16, 32, 64, 128)),
        *((b, m) for b in (2, 3, 5, 6, 8) for m in (1, 8)),
    ]:
        case = Product(rows, 1024, 1024, bits, GROUP, "f16")
        yield row(f"{bits}-bit, {count(rows)}", ours([case]), stock(case))


MIXES = {
    "q 4-bit, k 6-bit, v 8-bit": ((1024, 4), (256, 6), (256, 8)),
    "gate 3-bit, up 4-bit": ((2048, 3), (2048, 4)),
}


def mixed() -> Iterator[str]:
    for name, parts in MIXES.items():
        for rows in (1, 8, 16):
            cases = [Product(rows, out, 1024, bits, GROUP, "f16") for out, bits in parts]
            total = Figures()
            for case in cases:
                total = total + stock(case)
            yield row(f"{name}, {count(rows)}", ours(cases), total)


def others() -> Iterator[str]:
    for rows in (1, 32):
        case = Product(rows, 512, 1024, 4, GROUP, "f16")
        yield row(f"x @ w, {count(rows)}", ours([case], False), stock_not_transposed(case))
    yield row("8 rows to 4 experts", *experts(8, 4, 512, 4))
    for each in (8, 16, 40, 100):
        name = f"{4 * each} rows to 4 experts, sorted"
        yield row(name, *sorted_experts(each, 4, 512, 4))


def main() -> None:
    print("One weight [1024, 1024], float16, groups of 64; ours / stock, bytes in MB:\n")
    print(HEAD)
    for line in single():
        print(line, flush=True)
    print("\nSeveral weights that share x of 1024 columns:\n")
    print(HEAD)
    for line in mixed():
        print(line, flush=True)
    print("\nWithout transposing, w [512, 1024]; and experts [512, 512]; 4 bits:\n")
    print(HEAD)
    for line in others():
        print(line, flush=True)


if __name__ == "__main__":
    main()
