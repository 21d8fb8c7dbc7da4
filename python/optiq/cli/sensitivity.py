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
    from ..conversion import CALIBRATION_TOKENS, choose_rounding, gather, text_name
    from ..formats import DEFAULT_MENU, parse_menu
    from ..preflight import check_replaceable, check_unfinished, check_weights, check_writable
    from ..sources import load, resolve
    from .tables import scores_table

    out = Path(args.out).expanduser().resolve()
    checkpoint = out.with_name(out.name + ".checkpoint")
    check_replaceable(out)
    check_writable(out)
    check_unfinished(checkpoint, args.resume)
    menu = DEFAULT_MENU if args.formats is None else parse_menu(args.formats)
    source = resolve(args.model, revision=args.revision)
    loaded = load(source)
    tokens = args.tokens or CALIBRATION_TOKENS
    text = gather(loaded.tokenizer, args.calibration, "calibration", tokens, args.seed)
    check_weights(source)
    rounding = choose_rounding(args.rounding or "search", source, text, args.reference)
    with options.resumable(checkpoint):
        scores = sensitivity.measure(
            source,
            loaded=loaded,
            menu=menu,
            calibration=text,
            calibration_source=text_name(args.calibration),
            method=args.sensitivity,
            reference=args.reference,
            rounding=rounding,
            seed=args.seed,
            checkpoint=checkpoint,
            resume=args.resume,
        )
    sensitivity.save(scores, out)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(scores, indent=1) if args.json else scores_table(scores, out))
    return 0
