"""`optiq sensitivity MODEL -o FILE`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="file to write, such as scores.json")
    parser.add_argument(
        "--size",
        help="end before measuring where no plan can be so small; the scores serve all sizes",
    )
    options.add_measuring(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import world
    from ..quantize.score import checkpoint_of, score
    from .tables import after, scores_table

    out = Path(args.out).expanduser().resolve()
    fields = options.measuring(args)
    if args.size:
        fields["size"] = args.size
    with world() as ranks:
        with options.resumable(checkpoint_of(out)):
            scores = score(args.model, out, ranks, **fields)
        if ranks.rank == 0 and args.json:
            print(json.dumps(scores.to_json(), indent=1))
        elif ranks.rank == 0:
            print(scores_table(scores, out))
            file, model = shlex.quote(args.out), shlex.quote(args.model)
            convert = f"optiq convert {model} -o out --size 4.8bpw --scores {file}"
            print(after(f"optiq plan {file} --size 4.8bpw", convert))
    return 0
