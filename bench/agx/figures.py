"""Our kernels as they are planned for an M1, and MLX's for the same job: their static figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from optiq.formats import DENSE
from optiq.ops import AffineWeight, native
from optiq.ops.layer import Layer
from tests.metal.launcher import METAL, plan_quantized_attention, plan_quantized_matmul
from tests.msl.build import CACHE
from tests.msl.mlx_headers import QUANTIZED, SDPA_VECTOR

from .compiler import compile_kernel

GPU = "applegpu_g13g"
GROUP = 64
TYPES = {"half": "float16", "bfloat": "bfloat16", "float": "float32"}
BITS = (2, 3, 4, 5, 6, 8)
ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Kernel:
    """A kernel, and how many weights a lane decodes in a turn of its main loop, for which rows.

    In attention: elements of keys and of values.
    """

    job: str
    source: Path
    expression: str
    threads: tuple[int, int, int]
    weights: int
    rows: int


@dataclass(frozen=True)
class Figures:
    """Counted in the code. Cycles: of Mesa's model of the ALU, and one for each conversion."""

    registers: int  # of 16 bits, as the driver asks for
    threads: int  # that a core then holds
    spills: int  # instructions
    code: int  # bytes
    loop: int  # bytes
    threadgroup: int  # bytes of memory
    instructions: float  # per weight
    loads: float  # per weight, of device and threadgroup memory
    cycles: float  # per weight and row of x


def measure(kernel: Kernel) -> Figures:
    parts = compile_kernel(kernel.source, kernel.expression, kernel.threads)
    main: dict[str, Any] = parts["main"]
    ops = main["ops"]
    loop = max(main["loops"], key=lambda found: (found["ops"].get("ffma", 0), -found["inst"]))
    inner = loop["ops"]
    loads = inner.get("device_load", 0) + inner.get("local_load", 0)
    return Figures(
        registers=main["halfregs"] + 1,
        threads=main["threads"],
        spills=ops.get("stack_store", 0) + ops.get("stack_load", 0),
        code=main["bytes"],
        loop=loop["bytes"],
        threadgroup=parts["total"]["threadgroup_memory"],
        instructions=loop["inst"] / kernel.weights,
        loads=loads / kernel.weights,
        cycles=(loop["alu"] + inner.get("convert", 0)) / kernel.weights / kernel.rows,
    )


def ours(bits: Sequence[int], rows: int, kind: str = "half", experts: int = 0) -> Kernel:
    """One weight, several of different widths, or experts."""
    weights = [(4096, (GROUP, b)) for b in bits]
    plan = plan_quantized_matmul(
        rows, 4096, weights, TYPES[kind], TYPES[kind], True, experts, gpu=GPU, tune=""
    )
    (launch,) = plan["launches"]
    how = "experts, " if experts else ""
    name = f"{how}{' + '.join(map(str, bits))} bits, {rows} row{'s' * (rows > 1)}"
    results = int(launch["instantiation"].split(",")[3 if experts else 4])
    return Kernel(
        name if kind == "half" else f"{name}, {kind}", METAL / launch["source"],
        launch["instantiation"], tuple(launch["threads"]), 32 * results, rows,
    )  # fmt: skip


def layer(rows: int) -> list[Kernel]:
    """The products of a decoder layer in one dispatch each, of 4 bits."""
    assert native.extension is not None, native.reason
    gains = mx.ones(4096), 1e-5

    def weight(out: int, inner: int) -> AffineWeight:  # never evaluated
        scales = mx.zeros((out, inner // GROUP), mx.float16)
        return AffineWeight(mx.zeros((out, inner // 8), mx.uint32), scales, scales, GROUP, 4)

    of = Layer(
        4096, (weight(4096, 4096), weight(1024, 4096), weight(1024, 4096)), weight(4096, 4096),
        (weight(11008, 4096),) * 2, weight(4096, 11008), 32, 8, 128, 1.0, gains, gains,
    )  # fmt: skip
    plan = of.native(native.extension, mx.float16, (DENSE, DENSE)).plan(
        rows, (0, 1, 0), (0, 0, 0), (0, 0, 0), GPU, ""
    )
    jobs = {"layer_in": "norm, q, k, v", "layer_out": "output, residual",
            "layer_gated": "norm, gate, up, SwiGLU"}  # fmt: skip
    found = []
    for launch in plan["launches"]:
        name, _, arguments = launch["instantiation"].partition("<")
        if name in jobs:
            results = int(arguments.split(",")[5 if name == "layer_gated" else 4])
            job = f"{jobs.pop(name)}, 4 bits, {rows} row{'s' * (rows > 1)}"
            found.append(
                Kernel(job, METAL / launch["source"], launch["instantiation"],
                       tuple(launch["threads"]), 32 * results, rows)
            )  # fmt: skip
    return found


def stock(bits: int, rows: int, kind: str = "half") -> Kernel:
    """qmv_fast for one row; qmv_wide, 5 rows at most, for more: then several tiles of rows."""
    path = _kept("mlx_quantized.metal", QUANTIZED)
    name = f"MLX, {bits} bits, {rows} row{'s' * (rows > 1)}"
    name += "" if kind == "half" else f", {kind}"
    if rows == 1:
        packed = {2: 16, 3: 16, 4: 16, 5: 16, 6: 8, 8: 8}[bits]  # values of a lane at a time
        expression, weights = f"affine_qmv_fast<{kind}, {GROUP}, {bits}, false>", 4 * packed
        return Kernel(name, path, expression, (32, 2, 1), weights, 1)
    tile = min(rows, 4 if rows % 4 == 0 else 5)
    expression = f"affine_qmv_wide<{kind}, {GROUP}, {bits}, {tile}, 8, false>"
    return Kernel(name, path, expression, (32, 2, 1), 64, tile)


def attention(rows: int) -> Kernel:
    """So many query heads to a key head, of 128 values; keys in 8 bits and values in 4."""
    k, v = (128, (GROUP, 8)), (128, (GROUP, 4))
    plan = plan_quantized_attention(
        (1, 8 * rows, 8, 1, 8192), k, v, [0] * 3, [0] * 3, causal=True, gpu=GPU, tune=""
    )
    launch = plan["launches"][0]
    return Kernel(
        f"attention, K8 V4, {rows} row{'s' * (rows > 1)}", METAL / launch["source"],
        launch["instantiation"], tuple(launch["threads"]), 16, rows,
    )  # fmt: skip


def stock_attention() -> Kernel:
    """Of plain vectors; each query head reads the keys for itself."""
    path, threads = _kept("mlx_sdpa_vector.metal", SDPA_VECTOR), (1024, 1, 1)
    return Kernel("MLX, attention, 16 bits", path, "sdpa_vector<half, 128, 128>", threads, 8, 1)


def _kept(name: str, text: str) -> Path:
    path = CACHE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def kernels() -> Iterator[Kernel]:
    for bits in BITS:
        for rows in ROWS:
            yield ours([bits], rows)
            if rows <= 4:
                yield stock(bits, rows)
    for rows in ROWS:
        yield ours([4], rows, "bfloat")
    yield stock(4, 1, "bfloat")
    for rows in (1, 8):
        yield ours([4, 6, 8], rows)
    yield ours([4], 1, experts=4)
    for rows in (1, 8):
        yield from layer(rows)
    yield from map(attention, (1, 2, 3, 4))
    yield stock_attention()
