"""`optiq eval MODEL [--suite capability|NAME]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import options
from .tables import grid, number, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--suite",
        default="capability",
        metavar="NAME",
        help="capability (the default: all five benchmarks, KL and size), mmlu, gsm8k, ifeval, "
        "bfcl, humaneval, kl or size",
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
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..evals.runner import SUITES, evaluate

    if args.suite not in SUITES:
        raise UsageError(f"no suite is called {args.suite!r}; use one of {', '.join(SUITES)}")
    try:
        summary, out = evaluate(
            args.model,
            suite=args.suite,
            limit=args.limit,
            full=args.full,
            data_folder=args.data,
            out=args.out,
            reference=args.reference,
            revision=args.revision,
            resume=args.resume,
        )
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from here"
        raise KeyboardInterrupt(hint) from None
    print(json.dumps(summary, indent=1) if args.json else table(summary, out))
    return 0


def table(summary: Mapping[str, Any], out: Path) -> str:
    """A row per score with its 95 % interval, then KL, size and what is not there."""
    from ..evals.metrics import METRICS

    tasks, lines = summary["tasks"], []
    if summary["quick_look"]:
        lines.append("QUICK LOOK at a few items of each set: not comparable with any other figure")
    rows = [["", "score", "95 % interval", "items"]]
    for metric in METRICS:
        found = tasks.get(metric.task, {}).get("metrics", {}).get(metric.name)
        if found and metric.task != "kl":
            rows.append([metric.label, *_percent(found), str(found["n"])])
    if found := summary["capability"]:
        rows.append(["Capability Score", *_percent(found), str(found["n"])])
    if len(rows) > 1:
        lines += [grid(rows), ""]
    if found := tasks.get("kl", {}).get("divergence"):
        kl, top1 = found["kl"], found["top1"]
        lines.append(f"KL         {number(kl['mean'], kl['se'])} nats per token")
        keys = ("median", "p95", "p99", "p999", "max")
        lines.append(f"           {', '.join(f'{key} {number(kl[key])}' for key in keys)}")
        lines.append(f"top token  {100 * top1['mean']:.1f} % the same as the reference's")
    if found := summary["size"]:
        lines.append(f"size       {size(found['nbytes'])}, {found['bpw']:.3f} bits per weight")
    for name, why in summary["left_out"].items():
        lines.append(f"left out   {name}: {why}")
    for name, facts in tasks.items():
        if facts["done"] < facts["items"]:
            lines.append(f"unfinished {name}: {facts['done']} of {facts['items']} items")
    return "\n".join([*lines, f"records    {out}"])


def _percent(found: Mapping[str, Any]) -> list[str]:
    """A share and its interval."""
    if found["low"] is None:
        return [f"{100 * found['value']:.1f} %", "-"]
    return [
        f"{100 * found['value']:.1f} %",
        f"{100 * found['low']:.1f} - {100 * found['high']:.1f}",
    ]
