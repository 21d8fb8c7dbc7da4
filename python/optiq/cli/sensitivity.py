"""`optiq sensitivity MODEL -o FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:  # --help is quick
    from ..distributed.ranks import World


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

    with world() as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, world: World) -> int:
    from ..base.files import check_writable
    from ..calibration import SCORING_TOKENS, gather, text_name
    from ..formats import DEFAULT_MENU, parse_menu
    from ..quantize.preflight import (
        check_budget,
        check_replaceable,
        check_unfinished,
        check_weights,
    )
    from ..quantize.prepare import choose_rounding
    from ..quantize.sensitivity import measure as sensitivity
    from ..quantize.sensitivity.checkpoint import existing
    from ..sources import load, resolve
    from .tables import scores_table

    out = Path(args.out).expanduser().resolve()
    checkpoint = out.with_name(out.name + ".checkpoint")
    if world.rank == 0:  # the one who writes the file
        check_replaceable(out)
        check_writable(out)
    check_unfinished(checkpoint, args.resume)
    menu = DEFAULT_MENU if args.formats is None else parse_menu(args.formats)
    source = resolve(args.model, revision=args.revision)
    loaded = load(source)
    if args.size:
        check_budget(source, loaded, args.size, menu)
    tokens = args.tokens or SCORING_TOKENS
    text = gather(loaded.tokenizer, args.calibration, "calibration", tokens, args.seed)
    check_weights(source)
    rounding = choose_rounding(
        args.rounding or "search", source, text, args.reference, progress=world.rank == 0
    )
    with options.resumable(checkpoint):
        scores = sensitivity.measure(
            source,
            loaded=loaded,
            menu=menu,
            calibration=text,
            calibration_source=text_name(args.calibration),
            method=args.sensitivity,
            size=args.size or "uniform4",
            reference=args.reference,
            rounding=rounding,
            seed=args.seed,
            checkpoint=checkpoint,
            resume=args.resume,
            world=world,
        )
    if world.rank == 0:
        sensitivity.save(scores, out)
        print(json.dumps(scores, indent=1) if args.json else scores_table(scores, out))
    world.gather(None)  # nobody forgets before the result is safe
    for file in existing(checkpoint):
        file.unlink(missing_ok=True)
    return 0
