"""`optiq sensitivity MODEL -o FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="file to write, such as scores.json")
    parser.add_argument(
        "--size",
        help="with --sensitivity auto, the size at which the plan must be settled (default: "
        "uniform4); the scores serve plans of any size",
    )
    options.add_measuring(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import world
    from ..quantize.score import checkpoint_of, score
    from .tables import scores_table

    out = Path(args.out).expanduser().resolve()
    fields = options.measuring(args)
    if args.size:
        fields["size"] = args.size
    with world() as ranks:
        with options.resumable(checkpoint_of(out)):
            scores = score(args.model, out, ranks, **fields)
        if ranks.rank == 0:
            print(
                json.dumps(scores.to_json(), indent=1) if args.json else scores_table(scores, out)
            )
    return 0
