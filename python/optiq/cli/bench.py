"""`optiq bench`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find this GPU's best tile choices (an Apple GPU only; takes half an hour)",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..doctor import bench, selftest

    if args.tune:
        return _tune(args.json)
    timings = bench.measure(bench.ROWS, bench.SIZES)
    if args.json:
        lines = [asdict(t) for t in timings]
        print(json.dumps({"machine": selftest.machine(), "lines": lines}, indent=1))
        return 0
    print(f"{selftest.machine()}; times as fast as stock MLX, quartiles in brackets")
    for t in timings:
        low, high = t.quartiles
        print(f"{t.work}: {t.ms:.3f} ms, {t.faster:.2f} [{low:.2f}, {high:.2f}]")
    return 0


def _tune(as_json: bool) -> int:
    import mlx.core as mx

    from ..doctor import bench
    from ..ops import native

    if native.extension is None:
        raise bench.BenchError(f"no native kernels to tune: {native.reason}")
    if not mx.metal.is_available():
        raise bench.BenchError("--tune needs an Apple GPU; the CPU kernels have nothing to tune")
    silent = (lambda line: None) if as_json else print
    best = bench.tune(native.extension.tuning_knobs(), bench.gpu_cost, silent)
    chip = mx.device_info(mx.gpu)["architecture"]
    if as_json:
        print(json.dumps({"chip": chip, "tune": best}))
    elif best:
        print(f'Best for {chip}: OPTIQ_TUNE="{bench.setting(best)}"')
        print("Please send us this line, for the table in csrc/launch/tuning.cpp.")
    else:
        print(f"The table's choices are the best for {chip}.")
    return 0
