"""`optiq compare A B [--reference R]` and `optiq compare --evals A B`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options

TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", help="models to compare: folders, hub ids, .gguf files"
    )
    parser.add_argument(
        "--evals",
        action="store_true",
        help="compare what optiq eval recorded of two models (their folders, or those of the "
        "records), item by item",
    )
    parser.add_argument(
        "--reference", help="what they are compared with (default: the first model)"
    )
    parser.add_argument("--text", metavar="ROWS.jsonl", help="rows to measure on")
    parser.add_argument(
        "--tokens", type=options.positive, default=TOKENS, help="tokens to measure on"
    )
    options.add_seed(parser)
    parser.add_argument("-o", "--out", metavar="PAGE.html", help="write a page about it as well")
    options.add_overwrite(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.out:
        from ..base.files import check_absent, check_writable

        page = Path(args.out).expanduser().resolve()
        check_absent(page, args.overwrite)
        check_writable(page)
    return _records(args) if args.evals else _models(args)


def _records(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..evals import runs
    from ..evals.comparison import compare
    from ..evals.page import evals_page
    from ..report import write_page
    from .tables import evals_table

    if len(args.models) != 2:
        raise UsageError(f"--evals compares two models, not {len(args.models)}; name two")
    if args.reference or args.text or args.tokens != TOKENS or args.seed:
        raise UsageError(
            "--evals compares records that are there; --reference, --text, --tokens and --seed "
            "are for measuring, leave them out"
        )
    first, second = (runs.load(runs.locate(name)) for name in args.models)
    compared = compare(first, second)
    if args.out:
        write_page(Path(args.out), evals_page(compared, args.models))
    if args.json:
        print(json.dumps({"models": args.models, **compared.to_json()}, indent=1))
    else:
        print(evals_table(compared, args.models))
        _said(args)
    return 0


def _models(args: argparse.Namespace) -> int:
    from ..quality.compare import compare
    from ..report import write_page
    from ..report.comparison import comparison_page
    from .tables import metrics_table

    found = compare(
        *args.models, reference=args.reference, text=args.text, tokens=args.tokens, seed=args.seed
    )
    if args.out:
        write_page(Path(args.out), comparison_page(found))
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(f"reference: {found.reference}\ntext: {found.text}\n")
        print(metrics_table(found.models))
        _said(args)
    return 0


def _said(args: argparse.Namespace) -> None:
    if args.out:
        print(f"\npage       {args.out}")
