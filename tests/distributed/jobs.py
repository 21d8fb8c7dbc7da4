"""The jobs that ranks share, on a tiny model; the ranks of the tests run this file.

python -m tests.distributed.jobs MODEL OUT convert kv frontier eval
    [--killed-after FILE LINES]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import optiq
import optiq.calibration.texts
import optiq.quantize.convert
import optiq.quantize.estimate
from optiq.distributed.ranks import World

TEXT = {"tokens": 640, "held_out_tokens": 320, "progress": False}


def convert(model: Path, out: Path, **more: bool) -> None:
    # With the labels of this seed what is refined is better, and kept.
    options: dict[str, Any] = {"formats": "3,4,6,8", "refine_tokens": 640, "seed": 2, **TEXT}
    optiq.convert(model, out / "model", **options, **more)


def kv(model: Path, out: Path, **more: bool) -> None:
    optiq.kv_plan(model, out / "kv.json", context=192, samples=2, progress=False, **more)  # type: ignore[arg-type]


def frontier(model: Path, out: Path, **more: bool) -> None:
    scores = out / "model" / "optiq" / "sensitivity.json"
    optiq.frontier(model, out / "frontier", sizes=["5bpw"], scores=scores, **TEXT, **more)  # type: ignore[arg-type]


def evaluate(model: Path, out: Path, **more: bool) -> None:
    options: dict[str, Any] = {"tasks": "kl", "limit": 6, "reference": str(model)}
    optiq.evaluate(out / "model", out / "evals", **options, progress=False, **more)


JOBS = {"convert": convert, "kv": kv, "frontier": frontier, "eval": evaluate}


def die_after(file: Path, lines: int) -> None:
    """Kill rank 1 when it next has something for the others and the file has so many lines."""
    gather = World.gather

    def last(self: World, value: Any) -> list[Any]:
        if self.rank == 1 and file.exists() and file.read_bytes().count(b"\n") >= lines:
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(self, value)

    World.gather = last  # type: ignore[method-assign]


def main() -> None:
    optiq.calibration.texts.SELECTION_TOKENS = 320  # as tests/conftest.py
    optiq.quantize.convert.PROMPTS = ()
    optiq.quantize.estimate._PROBE, optiq.quantize.estimate._LONG_ENOUGH = 0.02, 0.002
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("jobs", nargs="+", choices=JOBS)
    parser.add_argument("--killed-after", nargs=2)
    args = parser.parse_args()
    if args.killed_after:
        file, lines = args.killed_after
        die_after(args.out / file, int(lines))
    for name in args.jobs:
        JOBS[name](args.model, args.out)


if __name__ == "__main__":
    main()
