"""`optiq plan FILE --size S`."""

from __future__ import annotations

import argparse
import json

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="a sensitivity.json, ours or mlx-optiq's, or a folder that optiq convert wrote"
    )
    options.add_size(parser)
    options.add_formats(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..planning.files import plan
    from .tables import plan_table

    found = plan(args.file, args.size, args.formats)
    print(json.dumps(found.to_json(), indent=1) if args.json else plan_table(found))
    return 0
