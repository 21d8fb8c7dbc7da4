"""`optiq convert MODEL -o OUT`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="folder to write; must not exist")
    options.add_size(parser)
    options.add_measuring(parser)
    parser.add_argument("--scores", metavar="FILE", help="use this sensitivity.json, don't measure")
    parser.add_argument("--dry-run", action="store_true", help="stop at the plan")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..convert import CALIBRATION_TOKENS, CHECKPOINT, convert, work_folder
    from .tables import plan_table

    try:
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
    except KeyboardInterrupt:
        if (work_folder(Path(args.out)) / CHECKPOINT).exists():
            print(
                "\noptiq convert: interrupted; the same command with --resume goes on from here",
                file=sys.stderr,
            )
            return 130
        raise
    plan = result.plan.to_json()
    print(json.dumps(plan, indent=1) if args.json else plan_table(plan, result.path))
    return 0
