"""`optiq demo`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="demo", help="folder for the model and the result")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("OPTIQ_PROGRESS", "1")
    from ..demo import QUESTION
    from ..demo import run as run_demo
    from .tables import plan_table

    folder = Path(args.dir)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcome = run_demo(folder, say=lambda line: print(line, flush=True))
    print("\n" + plan_table(outcome.result.plan.to_json(), outcome.result.path))
    print(f"\nasked      {QUESTION}")
    print(f"optiq      {outcome.answer!r} (stock mlx-lm, float32)")
    print(f"uniform 4  {outcome.uniform4_answer!r}")
    print(
        "\nThe KL above was measured on a small held-out sample; the scores behind the plan on "
        f"{outcome.result.scores['calibration']['tokens']} tokens."
    )
    print(f"took       {time.monotonic() - started:.0f} s")
    return 0
