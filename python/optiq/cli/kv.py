"""`optiq kv MODEL -o kv_config.json`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "-o", "--out", required=True, help="file to write, such as kv_config.json; reports beside"
    )
    parser.add_argument(
        "--size",
        default="8/4",
        help="8/4 (the bytes of 8-bit keys and 4-bit values, the default), or 40%% (of the 16-bit "
        "cache)",
    )
    parser.add_argument("--formats", help="widths to choose from (default: 3,4,5,6,8,bf16)")
    parser.add_argument(
        "--context",
        type=options.positive,
        help="tokens of a context (default: 4096, or what the model allows)",
    )
    parser.add_argument(
        "--samples",
        type=options.positive,
        help="contexts to score, choose and judge on, each (default: as many as the text has, "
        "up to 4)",
    )
    parser.add_argument(
        "--fp-recent",
        type=int,
        metavar="N",
        help="last tokens read in full precision, beside the budget (default: 128)",
    )
    parser.add_argument(
        "--fp-sink", type=int, metavar="N", help="first tokens, likewise (default: 4)"
    )
    options.add_calibration(parser)
    options.add_seed(parser)
    options.add_resume(parser)
    options.add_overwrite(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import world
    from ..quantize.kv.files import Files
    from ..quantize.kv.plan import kv_plan_together
    from .tables import after, kv_table

    files = Files(Path(args.out))
    with world() as ranks, options.resumable(files.checkpoint):
        report = kv_plan_together(
            ranks,
            args.model,
            args.out,
            size=args.size,
            context=args.context,
            samples=args.samples,
            formats=args.formats,
            fp_recent=args.fp_recent,
            fp_sink=args.fp_sink,
            calibration=args.calibration,
            revision=args.revision,
            seed=args.seed,
            resume=args.resume,
            restart=args.restart,
            overwrite=args.overwrite,
        )
    if ranks.rank != 0:
        return 0
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print(kv_table(report))
        print(f"\nwritten    {files.out}\nreport     {files.page}")
        model, kv = shlex.quote(args.model), shlex.quote(args.out)
        print(after(f"optiq chat {model} --kv {kv}", f"optiq serve {model} --kv {kv}"))
    return 0
