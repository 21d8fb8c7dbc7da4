"""`optiq card MODEL [-o README.md]`."""

from __future__ import annotations

import argparse
import json

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder that optiq convert wrote")
    parser.add_argument("-o", "--out", metavar="FILE", help="default: MODEL/README.md")
    parser.add_argument("--name", help="what it will be called on the hub, such as org/name")
    parser.add_argument("--base-model", metavar="ORG/NAME", help="hub id of what it was made from")
    parser.add_argument("--license", help="its licence (default: the base model's, if known)")
    parser.add_argument(
        "--uniform",
        metavar="FOLDER",
        help="stock uniform build of the same bytes to compare its records with",
    )
    parser.add_argument("--force", action="store_true", help="replace a file of other making")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..cards.card import card
    from .tables import card_table

    written = card(
        args.model,
        args.out,
        name=args.name,
        base_model=args.base_model,
        license=args.license,
        uniform=args.uniform,
        force=args.force,
    )
    print(json.dumps(written.facts.to_json(), indent=1) if args.json else card_table(written))
    return 0
