"""`optiq doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..base.text import folded
from ..errors import UsageError
from . import options

if TYPE_CHECKING:
    from ..doctor.selftest import Line
    from ..doctor.selftest import Speed as Timing

MOST_FAILURES = 10  # shown of each op


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="check this model instead: what its files say against what mlx-lm makes of them",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run the kernels against float64: on the GPU where there is one, else on the CPU",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.selftest:
        if args.model is not None:
            raise UsageError("--selftest takes no MODEL; run the two one after the other")
        return _selftest(args.json)
    from ..doctor.checks import examine
    from ..doctor.model import examine_model

    findings = examine() if args.model is None else examine_model(args.model)
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
        return 0
    width = max(len(f.name) for f in findings)
    for f in findings:
        indent = " " * (width + 2)
        print(folded(f"{f.name.ljust(width)}  {f.value}", sys.stdout, indent))
        if f.advice:
            print(folded(f"{indent}-> {f.advice}", sys.stdout, f"{indent}   "))
    return 0


def _selftest(as_json: bool) -> int:
    import mlx.core as mx

    from ..doctor import selftest

    gpu = mx.metal.is_available()
    machine, failed = selftest.machine(), 0
    if not as_json:
        print(f"{machine}; kernels on the {'GPU' if gpu else 'CPU'}")
    lines = []
    for line in selftest.run(gpu):
        lines.append(asdict(line))
        if isinstance(line, selftest.Line):
            failed += len(line.failures)
        if not as_json:
            print("\n".join(_describe(line)), flush=True)
    if as_json:
        print(json.dumps({"machine": machine, "gpu": gpu, "lines": lines}, indent=1))
    return 1 if failed else 0


def _describe(line: Line | Timing) -> list[str]:
    from ..doctor.selftest import Speed

    if isinstance(line, Speed):
        faster = line.stock / line.optiq
        return [f"{line.work}: {line.optiq:.3f} ms, stock {line.stock:.3f} ms, {faster:.2f} times"]
    verdict = "passed" if line.passed else f"{len(line.failures)} FAILED"
    text = [
        f"{line.op}: {line.cases} cases, {verdict}, largest error {line.error:.2f} of the bound"
    ]
    return text + [f"  {failure}" for failure in line.failures[:MOST_FAILURES]]
