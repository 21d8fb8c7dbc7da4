"""`optiq eval MODEL [--suite capability|NAME]`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.text import folded
from . import options
from .tables import after, grid, number, size

if TYPE_CHECKING:
    from ..evals.summary import Summary
    from ..quality.statistics import Estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--suite",
        action="extend",
        type=lambda text: text.split(","),
        metavar="NAME",
        help="capability (the default: all five benchmarks, KL and size), mmlu, gsm8k, ifeval, "
        "bfcl, humaneval, kl or size; several by commas, or by --suite again",
    )
    parser.add_argument(
        "--limit", type=options.positive, metavar="N", help="a quick look at N items of each"
    )
    parser.add_argument(
        "--full", action="store_true", help="all of MMLU, GSM8K and BFCL, not the fixed samples"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with the questions")
    parser.add_argument(
        "--reference",
        help="what KL is measured to (default: the model that optiq made this one from)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="folder of the records (default: MODEL/optiq/evals)"
    )
    options.add_resume(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import world
    from ..evals.runner import evaluate_together

    tasks = args.suite or "capability"
    names = ("limit", "full", "data", "reference", "revision", "resume", "restart")
    asked = {name: getattr(args, name) for name in names}
    with world() as ranks:
        try:
            summary = evaluate_together(ranks, args.model, args.out, tasks=tasks, **asked)
        except KeyboardInterrupt:
            hint = "; the same command with --resume goes on from here"
            raise KeyboardInterrupt(hint) from None
    if ranks.rank == 0:
        print(json.dumps(summary.to_json(), indent=1) if args.json else table(summary))
        if not args.json and (Path(args.model) / "optiq" / "plan.json").exists():
            print(after(f"optiq card {shlex.quote(args.model)}"))
    return 0


def table(summary: Summary) -> str:
    """A row per score with its 95 % interval, then KL, size and what is not there."""
    from ..evals.metrics import METRICS

    lines = []
    if summary.quick_look:
        said = "QUICK LOOK at a few items of each set: not comparable with any other figure"
        lines.append(folded(said, sys.stdout))
    rows = [["", "score", "95 % interval", "items"]]
    for metric in METRICS:
        task = summary.tasks.get(metric.task)
        if task and metric.name in task.metrics and metric.task != "kl":
            rows.append(_row(metric.label, task.metrics[metric.name]))
    if summary.capability:
        rows.append(_row("Capability Score", summary.capability))
    if len(rows) > 1:
        lines += [grid(rows), ""]
    kl = summary.tasks.get("kl")
    if kl and (found := kl.divergence):
        tail = {key: x for key, x in asdict(found.kl).items() if key not in ("mean", "se")}
        lines.append(f"KL         {number(found.kl.mean, found.kl.se)} nats per token")
        rest = ", ".join(f"{key} {number(x)}" for key, x in tail.items())
        lines.append(folded(" " * 11 + rest, sys.stdout, " " * 11))
        lines.append(f"top token  {100 * found.top1.mean:.1f} % the same as the reference's")
    if summary.size:
        lines.append(
            f"size       {size(summary.size.nbytes)}, {summary.size.bpw:.3f} bits per weight"
        )
    for name, why in summary.left_out.items():
        lines.append(folded(f"left out   {name}: {why}", sys.stdout, " " * 11))
    for name, task in summary.tasks.items():
        if task.done < task.header.items:
            lines.append(f"unfinished {name}: {task.done} of {task.header.items} items")
    return "\n".join([*lines, f"records    {summary.folder}"])


def _row(label: str, found: Estimate) -> list[str]:
    """A share and its interval, which a single cluster does not give."""
    low, high = 100 * found.low, 100 * found.high
    interval = f"{low:.1f} - {high:.1f}" if isfinite(low) else "-"
    return [label, f"{100 * found.value:.1f} %", interval, str(found.n)]
