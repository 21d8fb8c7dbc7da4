"""`optiq convert MODEL -o OUT`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from ..quantize.convert import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="folder to write")
    options.add_size(parser)
    options.add_effort(parser)
    options.add_measuring(parser)
    parser.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        help="train gains of rows and norms to predict what MODEL predicts, and keep that where "
        "it lowers the KL on other text (slow; the default with --effort best)",
    )
    parser.add_argument(
        "--refine-tokens",
        type=options.positive,
        metavar="N",
        help="calibration tokens to train on at most, with --refine (default: 16384)",
    )
    options.add_scores(parser)
    parser.add_argument(
        "--towers",
        choices=("keep", "8bit", "drop"),
        default="keep",
        help="the vision and audio weights of a multimodal model: keep (as they are, the "
        "default), 8bit, or drop",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="stop at the plan of least predicted KL"
    )
    parser.add_argument(
        "--upload-repo", metavar="ORG/NAME", help="then upload the model with its card to the hub"
    )
    options.add_json(parser)


def _refine_tokens(args: argparse.Namespace) -> int | None:
    from ..quantize.rounding import distill

    if args.refine is None:
        return None
    return (args.refine_tokens or distill.TOKENS) if args.refine else 0


def run(args: argparse.Namespace) -> int:
    from ..cards.upload import check_upload
    from ..distributed.ranks import world
    from ..errors import UsageError
    from ..quantize.convert import convert_together
    from ..quantize.prepare import CHECKPOINT, SCORES, work_folder
    from ..quantize.rounding import distill

    if args.refine_tokens and not args.refine:
        raise UsageError("--refine-tokens is for --refine; add it, or leave both out")
    if args.upload_repo:
        check_upload(args.upload_repo)
    work = work_folder(Path(args.out).expanduser().resolve())
    fields = options.measuring(args)
    fields["size"] = args.size
    fields["towers"] = args.towers
    with world() as ranks:
        with options.resumable(work / CHECKPOINT, work / distill.CHECKPOINT):
            result = convert_together(
                ranks, args.model, args.out, _refine_tokens(args), args.dry_run, **fields
            )
        if ranks.rank == 0:
            _tell(args, result, work / SCORES)
    return 0


def _tell(args: argparse.Namespace, result: Result, scores: Path) -> None:
    """Print what was made, and upload it where that is asked for."""
    from ..cards.upload import upload
    from .tables import plan_table, summary

    if args.json:
        print(json.dumps(result.plan.to_json(), indent=1))
    else:
        print(plan_table(result.plan) + "\n")
        print(_following(args, scores) if args.dry_run else summary(result, args.out))
    if args.upload_repo and not args.dry_run:
        url = upload(args.out, args.upload_repo)
        print(f"uploaded   {url}", file=sys.stderr if args.json else sys.stdout)


def _following(args: argparse.Namespace, scores: Path) -> str:
    """Where the scores of a dry run are, and how to go on with them."""
    from .tables import after

    scores = Path(args.scores) if args.scores else scores
    command = shlex.join(["optiq", "convert", args.model, "-o", args.out, "--size", args.size])
    return f"scores     {scores}\n" + after(f"{command} --scores {shlex.quote(str(scores))}")
