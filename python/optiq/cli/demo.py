"""`optiq demo`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ..base.text import folded
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="demo", help="folder for the model and the result")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..quantize.demo import QUESTION
    from ..quantize.demo import run as run_demo
    from .tables import facts_lines, plan_table, summary

    started = time.monotonic()
    steps = sys.stderr if args.json else sys.stdout

    def say(line: str) -> None:
        print(folded(line, steps), file=steps, flush=True)

    outcome = run_demo(Path(args.dir), say=say)
    plan = outcome.result.plan
    if args.json:
        answers = {"optiq": outcome.answer, "uniform4": outcome.uniform4_answer}
        found = {"model": outcome.source, "question": QUESTION, "answers": answers}
        print(json.dumps({**found, "plan": plan.to_json()}, indent=1))
        return 0
    print("\n" + plan_table(plan) + "\n")
    asked = [
        ("asked", QUESTION),
        ("optiq", f"{outcome.answer!r} (stock mlx-lm, float32)"),
        ("uniform 4", repr(outcome.uniform4_answer)),
    ]
    print(facts_lines(asked) + "\n")
    tokens = outcome.result.scores.calibration.tokens
    sample = (
        "The KL was measured on a small held-out sample, the scores behind the plan on "
        f"{tokens} tokens. The demo took {time.monotonic() - started:.0f} s in all."
    )
    print(folded(sample, sys.stdout) + "\n")
    print(summary(outcome.result, str(outcome.result.path)))
    return 0
