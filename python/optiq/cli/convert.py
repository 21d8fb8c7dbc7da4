"""`optiq convert MODEL -o OUT`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="folder to write; must not exist")
    options.add_size(parser)
    options.add_measuring(parser)
    parser.add_argument(
        "--refine",
        action="store_true",
        help="train scales and biases to predict what MODEL predicts, and keep that where it "
        "lowers the KL on other text (slow)",
    )
    parser.add_argument(
        "--refine-tokens",
        type=options.positive,
        metavar="N",
        help="calibration tokens to train on at most, with --refine (default: 16384)",
    )
    parser.add_argument("--scores", metavar="FILE", help="use this sensitivity.json, don't measure")
    parser.add_argument(
        "--dry-run", action="store_true", help="stop at the plan of least predicted KL"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..quantize.convert import convert
    from ..quantize.prepare import CHECKPOINT, SCORES, work_folder
    from ..quantize.rounding import distill
    from .tables import plan_table, scores_line

    if args.refine_tokens and not args.refine:
        raise UsageError("--refine-tokens is for --refine; add it, or leave both out")
    work = work_folder(Path(args.out).expanduser().resolve())
    fields = options.measuring(args)
    fields["size"] = args.size
    with options.resumable(work / CHECKPOINT, work / distill.CHECKPOINT):
        result = convert(
            args.model,
            args.out,
            refine_tokens=(args.refine_tokens or distill.TOKENS) if args.refine else 0,
            dry_run=args.dry_run,
            **fields,
        )
    if args.json:
        print(json.dumps(result.plan.to_json(), indent=1))
    else:
        print(plan_table(result.plan, result.path))
        print(f"scores     {scores_line(result.scores)}")
    if args.dry_run and not (args.scores or args.json):
        print(
            f"\nscores     {work / SCORES}; the same command with --resume and without --dry-run "
            "writes the model"
        )
    return 0
