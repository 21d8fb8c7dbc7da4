"""`optiq plan FILE --size S`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a sensitivity.json, ours or mlx-optiq's")
    options.add_size(parser)
    options.add_formats(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..formats import parse_menu
    from ..planning.plan import build
    from ..planning.scores import read
    from .tables import plan_table

    menu = None if args.formats is None else parse_menu(args.formats)
    plan = build(read(Path(args.file)), args.size, menu).to_json()
    print(json.dumps(plan, indent=1) if args.json else plan_table(plan, None))
    return 0
