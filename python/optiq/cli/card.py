"""`optiq card MODEL [-o README.md]`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

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
    parser.add_argument(
        "--upload-repo", metavar="ORG/NAME", help="upload the model with this card to the hub"
    )
    parser.add_argument("--private", action="store_true", help="with --upload-repo: for you alone")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..cards.card import card
    from ..cards.upload import check_upload, upload
    from ..errors import UsageError
    from .tables import after, card_table

    if args.private and not args.upload_repo:
        raise UsageError("--private is for --upload-repo; add it, or leave both out")
    if args.upload_repo:
        check_upload(args.upload_repo)
    written = card(
        args.model,
        args.out,
        name=args.name or args.upload_repo,
        base_model=args.base_model,
        license=args.license,
        uniform=args.uniform,
        force=args.force,
    )
    if args.upload_repo:
        url = upload(args.model, args.upload_repo, private=args.private)
    print(json.dumps(written.facts.to_json(), indent=1) if args.json else card_table(written))
    if args.upload_repo:
        print(f"uploaded   {url}", file=sys.stderr if args.json else sys.stdout)
    elif not args.json:
        said = (("--base-model", args.base_model), ("--license", args.license))
        again = shlex.join([args.model, *(w for o, v in said if v for w in (o, v))])
        print(after(f"optiq card {again} --upload-repo {args.name or 'ORG/NAME'}"))
    return 0
