"""`optiq frontier MODEL -o FOLDER`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "-o", "--out", required=True, help="folder for frontier.json and frontier.html"
    )
    parser.add_argument(
        "--sizes",
        help="sizes of ours, as for convert --size (default: 3.5bpw,4bpw,uniform4,5bpw,6bpw)",
    )
    options.add_measuring(parser)
    options.add_scores(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import world
    from ..quantize.frontier import POINTS, SIZES, frontier_together
    from ..quantize.frontier_files import HTML
    from ..quantize.prepare import CHECKPOINT, SCORES, work_folder
    from .tables import after, frontier_table

    work = work_folder(Path(args.out).expanduser().resolve())
    sizes = SIZES if args.sizes is None else args.sizes.split(",")
    left = work / POINTS if args.scores else work / CHECKPOINT
    with world() as ranks, options.resumable(left):
        found = frontier_together(ranks, args.model, args.out, sizes, **options.measuring(args))
    if ranks.rank != 0:
        return 0
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(f"{frontier_table(found)}\n\nreport     {args.out}/{HTML}")
        scores = shlex.quote(args.scores or f"{args.out}/{SCORES}")
        model = shlex.quote(args.model)
        print(after(f"optiq convert {model} -o out --size 5bpw --scores {scores}"))
    return 0
