"""`optiq convert MODEL -o OUT`."""

from __future__ import annotations

import argparse
import json

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="folder to write; must not exist")
    options.add_size(parser)
    options.add_measuring(parser)
    parser.add_argument("--scores", metavar="FILE", help="use this sensitivity.json, don't measure")
    parser.add_argument(
        "--dry-run", action="store_true", help="stop at the plan of least predicted KL"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..calibration import CALIBRATION_TOKENS
    from ..conversion import convert
    from ..preparation import CHECKPOINT, SCORES, work_folder
    from .tables import plan_table, scores_line

    with options.resumable(work_folder(args.out) / CHECKPOINT):
        result = convert(
            args.model,
            args.out,
            size=args.size,
            formats=args.formats,
            sensitivity=args.sensitivity,
            reference=args.reference,
            calibration=args.calibration,
            tokens=args.tokens or CALIBRATION_TOKENS,
            rounding=args.rounding,
            scores=args.scores,
            revision=args.revision,
            seed=args.seed,
            resume=args.resume,
            dry_run=args.dry_run,
        )
    plan = result.plan.to_json()
    if args.json:
        print(json.dumps(plan, indent=1))
    else:
        print(plan_table(plan, result.path))
        print(f"scores     {scores_line(result.scores)}")
    if args.dry_run and not (args.scores or args.json):
        print(
            f"\nscores     {work_folder(args.out) / SCORES}; the same command with --resume and "
            "without --dry-run writes the model"
        )
    return 0
