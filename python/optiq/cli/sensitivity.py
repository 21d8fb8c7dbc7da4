"""`optiq sensitivity MODEL -o FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("-o", "--out", required=True, help="file to write, such as scores.json")
    options.add_measuring(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import sensitivity
    from ..convert import CALIBRATION_TOKENS, gather_text
    from ..formats import DEFAULT_MENU, parse_menu
    from ..sources import load, resolve
    from .tables import scores_table

    menu = DEFAULT_MENU if args.formats is None else parse_menu(args.formats)
    source = resolve(args.model, revision=args.revision)
    loaded = load(source)
    tokens = args.tokens or CALIBRATION_TOKENS
    text = gather_text(loaded, args.calibration, tokens, tokens, args.seed)
    out = Path(args.out)
    checkpoint = out.with_name(out.name + ".checkpoint")
    scores = sensitivity.measure(
        source,
        loaded=loaded,
        menu=menu,
        calibration=text.calibration,
        calibration_source=text.source,
        method=args.sensitivity,
        reference=args.reference,
        rounding=args.rounding,
        seed=args.seed,
        checkpoint=checkpoint,
        resume=args.resume,
    )
    sensitivity.save(scores, out)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(scores, indent=1) if args.json else scores_table(scores, out))
    return 0
