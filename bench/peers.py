"""Quantized products: optiq, stock MLX and ggml (llama.cpp) on this machine, in one run.

    python bench/peers.py [GGML_FOLDER] [--threads N] [--exact] [--json FILE]

GGML_FOLDER holds ggml's shared libraries (bench/ggml.py says where to get them); without it only
stock MLX is compared. Our weights are in reading order and activations in 16 bits, as a loaded
model has them. Every product is timed in rounds, one run of each program per round, so a
disturbance meets all; the ratio is the median over the rounds of ratios within a round, with the
quartiles beside it. OPTIQ_NUM_THREADS must be set before the start: --threads does that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optiq  # noqa: F401 - before mlx

# isort: split
import mlx.core as mx
import numpy as np

from optiq.doctor.bench import ratio, rounds
from optiq.ops import native

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.ggml import Ggml

SIZES = (2048, 4096)
ROWS = (1, 8, 128)
BATCH = 8
PAUSE = 0.02  # seconds; ggml's threads stay awake for some milliseconds
DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16}
# What ggml has for 4-bit weights, as stored or repacked for this processor.
GGML = (("q4_0", True), ("q4_K", True), ("q4_K", False))


def compare(
    size: int, rows: int, dtype: str, ggml: Ggml | None, budget: float, exact: bool
) -> dict[str, object]:
    rng = np.random.default_rng(size + rows)
    dense = rng.standard_normal((size, size), dtype=np.float32)
    x32 = rng.standard_normal((rows, size), dtype=np.float32)
    x = mx.array(x32).astype(DTYPES[dtype])
    weight = mx.quantize(mx.array(dense).astype(DTYPES[dtype]), 64, 4)
    mx.eval(x, weight)
    # Several products in one evaluation, as in a model: handing one over costs MLX 20 to 50 us.
    batch = BATCH if rows == 1 else 1
    tiles = native.extension.tile(*weight, 64, 4)
    product = partial(native.extension.tiled_matmul, x, tiles, exact)
    ours = {"optiq": lambda: mx.eval([product() for _ in range(batch)])}
    theirs: dict[str, Callable[[], object]] = {}
    if dtype == "f32" and ggml is not None:
        for kind, repacked in GGML:
            theirs_of = ggml.product(kind, dense, rows, repacked)
            theirs_of.set(x32)
            theirs[kind + (" repacked" if repacked else "")] = theirs_of.run
    times = rounds(ours | theirs, budget, pause=PAUSE)
    times["optiq"] /= batch
    stock = rounds(ours | {"stock": lambda: mx.eval(mx.quantized_matmul(x, *weight))}, budget)
    result: dict[str, object] = {
        "size": size,
        "rows": rows,
        "dtype": dtype,
        "optiq_ms": float(np.median(times["optiq"]) * 1e3),
        "stock": ratio(stock["stock"], stock["optiq"] / batch),
    }
    for name in theirs:
        result[name] = ratio(times[name], times["optiq"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ggml", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each product")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--exact", action="store_true", help="as exact as of floats")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = str(args.threads)
    if os.environ.get("OPTIQ_NUM_THREADS") != threads:  # it is read when the kernels load
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"OPTIQ_NUM_THREADS": threads}
        )
    if native.extension is None:
        sys.exit(f"no native kernels to measure: {native.reason}")
    ggml = Ggml(args.ggml, args.threads) if args.ggml else None
    print(f"4-bit g64, {native.extension.isa()}, {threads} threads; times as fast as the others")
    results = []
    for dtype in args.dtypes:
        for size in SIZES:
            for rows in ROWS:
                result = compare(size, rows, dtype, ggml, args.budget, args.exact)
                results.append(result)
                cells = [
                    f"{name} {v[1]:.2f} [{v[0]:.2f}, {v[2]:.2f}]"
                    for name, v in result.items()
                    if isinstance(v, tuple)
                ]
                print(
                    f"{size}x{size} {dtype} M={rows}: {result['optiq_ms']:.3f} ms;",
                    "; ".join(cells),
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
