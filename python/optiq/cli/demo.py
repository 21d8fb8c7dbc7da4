"""`optiq demo`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="demo", help="folder for the model and the result")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..quantize.demo import QUESTION
    from ..quantize.demo import run as run_demo
    from .tables import plan_table, summary

    started = time.monotonic()
    steps = sys.stderr if args.json else sys.stdout
    outcome = run_demo(Path(args.dir), say=lambda line: print(line, file=steps, flush=True))
    plan = outcome.result.plan
    if args.json:
        answers = {"optiq": outcome.answer, "uniform4": outcome.uniform4_answer}
        found = {"model": outcome.source, "question": QUESTION, "answers": answers}
        print(json.dumps({**found, "plan": plan.to_json()}, indent=1))
        return 0
    print("\n" + plan_table(plan) + "\n")
    print(summary(outcome.result, str(outcome.result.path)))
    print(f"\nasked      {QUESTION}")
    print(f"optiq      {outcome.answer!r} (stock mlx-lm, float32)")
    print(f"uniform 4  {outcome.uniform4_answer!r}")
    print(
        "\nThe KL above was measured on a small held-out sample; the scores behind the plan on "
        f"{outcome.result.scores.calibration.tokens} tokens."
    )
    print(f"took       {time.monotonic() - started:.0f} s")
    return 0
